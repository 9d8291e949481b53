"""MultiMix as a timm training task: timm's classification task, with the MultiMix loss in the epochs it is on."""
import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, MultiLabelClassificationTask
from timm.utils import unwrap_model
from torch import nn

from .hook import attach
from .losses import MultiMixLoss, MultiMixOutput

_logger = logging.getLogger(__name__)

TASK_MODES = ('off', 'pooled', 'dense')


def loss_options(criterion: nn.Module | Callable) -> dict[str, Any]:
    """How MultiMix has to treat targets to be the mixed form of a plain criterion.

    Args:
        criterion: The loss that trains unmixed examples.

    Returns:
        'loss_type' and 'smoothing' of MultiMixLoss.

    Raises:
        ValueError: if the loss of a mix is not the mix's loss of logits and targets, with the reason.
    """
    if isinstance(criterion, nn.CrossEntropyLoss):
        if criterion.weight is not None or criterion.reduction != 'mean' or criterion.ignore_index >= 0:
            raise ValueError('MultiMix supports no class weights, no ignore_index, and no reduction but the mean.')
        return dict(loss_type='ce', smoothing=criterion.label_smoothing)
    if isinstance(criterion, LabelSmoothingCrossEntropy):
        return dict(loss_type='ce', smoothing=criterion.smoothing)
    if isinstance(criterion, SoftTargetCrossEntropy):
        return dict(loss_type='ce', smoothing=0.0)
    if isinstance(criterion, BinaryCrossEntropy):
        if criterion.weight is not None or criterion.pos_weight is not None:
            raise ValueError('MultiMix does not support class weights or positive weights of binary cross-entropy.')
        if not criterion.sum_classes and criterion.reduction != 'mean':
            raise ValueError(f'MultiMix needs a loss that is a mean, got reduction={criterion.reduction!r}.')
        return dict(loss_type='bce', smoothing=0.0)  # the task smooths, as timm's loss does
    name = getattr(criterion, '__name__', None) or type(criterion).__name__
    raise ValueError(
        f'MultiMix mixes cross-entropy and binary cross-entropy, and {name} is neither: use one of them, or train '
        'without MultiMix.')


class MultiMixTask(ClassificationTask):
    """Trains a timm model with MultiMix.

    A drop-in for timm's ClassificationTask. The model returns its ordinary logits and those at every position (see
    attach), and MultiMixLoss mixes them in the epochs that MultiMix is on; in the others this is ClassificationTask, at
    its cost. Checkpoints hold the model's plain state_dict. Validation, EMA, compilation and distribution are timm's.

    Args:
        model: The timm model to train. It is attached here: do not attach it before.
        criterion: The plain loss. Its kind (softmax or binary) and its label smoothing are MultiMix's too.
        criterion_kwargs: Arguments for timm's create_classification_loss() when criterion is None.
        mode: 'dense' (mixes at every position), 'pooled' (mixes ordinary logits), or 'off'.
        attention: Weights of positions: 'uniform', 'gap', 'token' or 'cam' (dense mode only).
        attention_norm: 'relu' or 'softmax'.
        start_epoch: First epoch with MultiMix, counted from 0.
        off_epoch: First epoch without it again; 0 means never, as in timm's mixup_off_epoch.
        device: Device for task tensors and buffers.
        dtype: Dtype for task tensors and buffers.
        verbose: Log what is trained.
        **options: Of MultiMixLoss, such as num_mixes, alpha, tuple_length, balance, pooled_weight or clean_weight.

    Raises:
        ValueError: if an option is out of range, the model's head cannot be applied at a position, or the criterion has
            no mixed form.
        TypeError: if the model does not follow timm's protocol, or an option is unknown.

    Examples:

        ```python
        task = MultiMixTask(model, criterion_kwargs=dict(smoothing=0.1), num_mixes=1000, device=torch.device('cuda'))
        for epoch in range(epochs):
            task.set_epoch(epoch)
            for input, target in loader:
                task(input, target)['loss'].backward()
                ...
        ```
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | Callable | None = None,
            criterion_kwargs: dict[str, Any] | None = None,
            *,
            mode: str = 'dense',
            attention: str = 'gap',
            attention_norm: str = 'relu',
            start_epoch: int = 0,
            off_epoch: int = 0,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
            **options,
    ):
        if mode not in TASK_MODES:
            raise ValueError(f'mode must be one of {", ".join(TASK_MODES)}, got {mode!r}.')
        if start_epoch < 0 or off_epoch < 0 or 0 < off_epoch <= start_epoch:
            raise ValueError(
                'MultiMix is on from start_epoch until off_epoch (0 for never): '
                f'start_epoch={start_epoch} and off_epoch={off_epoch} leave no epoch to it.')
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.mode = mode
        self.start_epoch = start_epoch
        self.off_epoch = off_epoch
        # The logits of the true class are known to the loss only, all other queries to the model only.
        in_loss = mode == 'dense' and attention == 'cam'
        self._attach_options = dict(
            mode=mode, attention='uniform' if in_loss else attention, attention_norm=attention_norm)
        if '_multimix' in vars(model):  # attached before: take that back
            attach(model, 'pooled').remove()
        self._handle = None
        self.loss = None
        if mode != 'off':
            self.loss = MultiMixLoss(
                attention='cam' if in_loss else None,
                attention_norm=attention_norm,
                **loss_options(self.criterion),
                **options,
            )
            self._check_objective()
        self.set_epoch(0)
        if verbose and mode != 'off':
            _logger.info(f'{type(self).__name__}: mode={mode}, attention={attention}, {self.loss.extra_repr()}')

    def _check_objective(self) -> None:
        """Attach once, whatever the first epoch: a model that cannot be served is refused here, not hours later."""
        self._switch(True)
        trained_by_positions_only = self.mode == 'dense' and self.loss.pooled_weight == 0 == self.loss.clean_weight
        if trained_by_positions_only and not self._handle.reads_positions:
            raise ValueError(
                "This model predicts from its class token, which the dense term does not train: set pooled_weight or "
                'clean_weight above 0.')

    @property
    def active(self) -> bool:
        """Whether MultiMix is on in the current epoch."""
        return self._handle is not None

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Parts of the loss that forward returns while MultiMix is on."""
        if self.loss is None:
            return ()
        dense = self.mode == 'dense' and self.loss.pooled_weight < 1
        pooled = self.mode == 'pooled' or self.loss.pooled_weight > 0
        clean_weight = self.loss.clean_weight
        shown = dict(dense=dense and clean_weight < 1, pooled=pooled and clean_weight < 1, clean=clean_weight > 0)
        return tuple(name for name, is_shown in shown.items() if is_shown)

    def set_epoch(self, epoch: int) -> None:
        """Switch MultiMix on or off, as start_epoch and off_epoch say. Call it before every epoch."""
        ended = self.off_epoch and epoch >= self.off_epoch
        self._switch(self.mode != 'off' and epoch >= self.start_epoch and not ended)

    def _switch(self, on: bool) -> None:
        # A detached model is the plain one: an epoch without MultiMix does no work for it, compiled or not.
        if on and self._handle is None:
            self._handle = attach(unwrap_model(self.trainable_module), **self._attach_options)
        elif not on and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Forward pass and loss.

        Args:
            input: Images (b, c, h, w).
            target: Class indices (b,), or soft or multi-hot targets (b, c).

        Returns:
            'loss'; 'output', the ordinary logits; and the parts of the MultiMix loss that have weight ('dense',
            'pooled', 'clean'), detached, for logging.
        """
        output = self.trainable_module(input)
        if not isinstance(output, MultiMixOutput):  # MultiMix is off, or the task is in evaluation mode
            return {'loss': self.criterion(output, target), 'output': output}
        terms = self.loss.terms(output, self._mixable(target, output.logits))
        if getattr(self.criterion, 'sum_classes', False):
            terms = {name: term * output.logits.shape[-1] for name, term in terms.items()}
        parts = {name: term.detach() for name, term in terms.items() if name != 'loss'}
        return {'loss': terms['loss'], 'output': output.logits, **parts}

    def _mixable(self, target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Targets as timm's BinaryCrossEntropy reads them, so that those are mixed; others as they are."""
        criterion = self.criterion
        if not isinstance(criterion, BinaryCrossEntropy):
            return target
        if target.ndim == 1:
            off_value = criterion.smoothing / logits.shape[-1]
            rows = logits.new_full(logits.shape, off_value, dtype=torch.float32)
            target = rows.scatter_(1, target.unsqueeze(1), 1 - criterion.smoothing + off_value)
        elif criterion.smooth_dense and criterion.smoothing:
            target = target * (1 - criterion.smoothing) + 0.5 * criterion.smoothing
        if criterion.target_threshold is not None:
            target = target.gt(criterion.target_threshold).to(target.dtype)
        return target


class MultiLabelMultiMixTask(MultiMixTask, MultiLabelClassificationTask):
    """MultiMixTask for multi-hot targets (b, c), with timm's multi-label losses and evaluator.

    Args:
        model: The timm model to train.
        threshold: Probability from which on a label counts as predicted, for the evaluator's F1.
        **options: As MultiMixTask.
    """

    def __init__(self, model: nn.Module, *args, threshold: float = 0.5, **options):
        if not 0 < threshold < 1:
            raise ValueError(f'threshold is a probability and must lie between 0 and 1, got {threshold}.')
        super().__init__(model, *args, **options)
        self.threshold = threshold

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Forward pass and loss, as MultiMixTask; targets are floating point (b, c)."""
        if target.ndim != 2 or not target.is_floating_point():
            raise ValueError(
                f'Multi-label targets must be floating point (b, c), got {target.dtype} with shape '
                f'{tuple(target.shape)}.')
        return super().forward(input, target)
