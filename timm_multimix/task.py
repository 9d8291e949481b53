"""MultiMix as a timm training task: timm's classification task, with the MultiMix loss in the epochs it is on."""
import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy
from timm.task import ClassificationTask, MultiLabelClassificationTask
from timm.utils import unwrap_model
from torch import nn

from .criteria import check_num_classes, loss_options
from .data.alternation import BatchSchedule
from .data.views import split_views
from .dense.hook import attach, detach
from .losses.attention import check_attention
from .losses.functional import class_rows
from .losses.module import MultiMixLoss, MultiMixOutput
from .teacher import EMATeacher, FrozenTeacher, PretrainedTeacher, SelfDistillationLoss, check_teacher

_logger = logging.getLogger(__name__)

TASK_MODES = ('off', 'pooled', 'dense')
# The probability of a MultiMix batch that goes with each preset of MultiMixLoss.
PRESET_PROB = {'default': 1.0, 'paper': 0.5}


def _without_overflow(output: MultiMixOutput) -> MultiMixOutput:
    """Make the logits NaN where the attention of the model overflowed, so that the loss is not finite either.

    Weights that diverge are no wrong argument, which the loss would raise an error for. It does so on the CPU only.
    """
    attention = output.attention
    if attention is None or attention.device.type != 'cpu' or attention.isfinite().all():
        return output
    return output._replace(dense_logits=output.dense_logits * torch.nan)


class MultiMixTask(ClassificationTask):
    """Trains a timm model with MultiMix.

    A drop-in for timm's ClassificationTask. On a MultiMix batch the model returns its ordinary logits and the logits at
    every position (see attach), and MultiMixLoss mixes them. Other batches are trained as by ClassificationTask, at the
    same cost. Checkpoints hold the model's plain state_dict. Validation, EMA, compilation and distribution are timm's.

    With prob < 1 every batch is assigned at random: with that probability it is a MultiMix batch, otherwise the plain
    criterion trains it, usually on mixed images. Whoever mixes the images must not mix those of MultiMix batches, so a
    loader that mixes decides first (see BatchSchedule) and passes its decision to forward(). Without one the task
    decides, from the seed and the number of training batches so far, which is part of its state.

    Args:
        model: The timm model to train. It is attached here: do not attach it before.
        criterion: The plain loss. Its kind (softmax or binary) and its label smoothing are MultiMix's too.
        criterion_kwargs: Arguments for timm's create_classification_loss() when criterion is None.
        mode: 'dense' (mixes at every position), 'pooled' (mixes ordinary logits), or 'off'.
        preset: 'default', or 'paper' for what the papers' experiments use: see MultiMixLoss, and prob=0.5.
        prob: Probability of a MultiMix batch; None takes the preset's, which is 1 by default.
        seed: Seed of the task's own decisions for prob < 1.
        attention: Weights of positions: 'uniform', 'gap', 'token' or 'cam' (dense mode only).
        attention_norm: 'relu' or 'softmax'.
        start_epoch: First epoch with MultiMix, counted from 0.
        off_epoch: First epoch without it again; 0 means never, as in timm's mixup_off_epoch.
        teacher: 'none', 'ema' (the average of the model, see EMATeacher), the name of a timm model with pretrained
            weights, or a module that maps images to logits or to a MultiMixOutput. A module is frozen, and is in
            evaluation mode from then on.
        teacher_decay: Decay of the 'ema' teacher.
        teacher_path: Checkpoint of a teacher that is named.
        distill_weight: Share of the distillation term with a teacher, in [0, 1].
        distill_temperature: Divides both sides' logits in that term.
        distill_ramp_epochs: Epochs over which that share grows from 0, once set_epoch is called.
        views: Of 2 the student sees the first and the teacher the second: images are then (b, 2c, h, w), see
            timm_multimix.data.views. 1 shows the same image to both.
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
            preset: str = 'default',
            prob: float | None = None,
            seed: int = 0,
            attention: str = 'gap',
            attention_norm: str = 'relu',
            start_epoch: int = 0,
            off_epoch: int = 0,
            teacher: str | nn.Module = 'none',
            teacher_decay: float = 0.999,
            teacher_path: str | None = None,
            distill_weight: float = 0.25,
            distill_temperature: float = 1.0,
            distill_ramp_epochs: int = 5,
            views: int = 1,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
            **options,
    ):
        if mode not in TASK_MODES:
            raise ValueError(f'mode must be one of {", ".join(TASK_MODES)}, got {mode!r}.')
        if prob is None:
            prob = PRESET_PROB.get(preset, 1.0)
        schedule = BatchSchedule(prob, seed, start_epoch, off_epoch)
        check_attention(attention, attention_norm)
        check_teacher(teacher, teacher_decay, teacher_path, views)
        if mode == 'off' and teacher != 'none':
            raise ValueError("A teacher is part of the MultiMix loss: with mode='off' pass teacher='none'.")
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.mode = mode
        self.schedule = schedule if mode != 'off' else BatchSchedule(prob=0)
        self.epoch = 0
        self.num_batches = 0  # decided by the task itself
        # The logits of the true class are known to the loss only, all other queries to the model only.
        in_loss = mode == 'dense' and attention == 'cam'
        reads_attention = mode == 'dense' and not in_loss
        self._attach_options = dict(
            mode=mode, attention=attention if reads_attention else 'uniform', attention_norm=attention_norm)
        detach(model)
        self._handle = None
        self.loss = self.distillation = self.teacher = None
        self.views = views
        check_num_classes(self.criterion, getattr(unwrap_model(model), 'num_classes', None))
        # Created with mode='off' too, so that wrong options are errors in every mode.
        loss = MultiMixLoss(
            preset=preset,
            attention='cam' if in_loss else None,
            attention_norm=attention_norm,
            **(dict(loss_type='ce', smoothing=0.0) if mode == 'off' else loss_options(self.criterion)),
            **options,
        )
        distillation = SelfDistillationLoss(loss, distill_weight, distill_temperature, distill_ramp_epochs)
        if mode != 'off':
            self.loss = loss
            self._handle = attach(unwrap_model(self.trainable_module), **self._attach_options)
            self._check_objective()
            if teacher != 'none':
                self.distillation = distillation
                self.teacher = self._make_teacher(teacher, teacher_decay, teacher_path)
        if verbose and mode != 'off':
            _logger.info(
                f'{type(self).__name__}: mode={mode}, prob={prob}, attention={attention}, {self.loss.extra_repr()}')

    @property
    def _leaves_class_token(self) -> bool:
        """Whether MultiMix batches do not train the class token that the model predicts from."""
        positions_only = self.mode == 'dense' and self.loss.pooled_weight == 0 == self.loss.clean_weight
        return positions_only and not self._handle.reads_positions

    def _check_objective(self) -> None:
        if self.schedule.prob == 1 and self._leaves_class_token:
            raise ValueError(
                'This model predicts from its class token, which the dense term does not train: set pooled_weight or '
                'clean_weight above 0, or prob below 1.')

    def _make_teacher(self, teacher: str | nn.Module, decay: float, path: str | None) -> nn.Module:
        if teacher == 'ema':
            return EMATeacher(self.trainable_module, decay)  # a copy of the model, attached as it is now
        if isinstance(teacher, str):
            return PretrainedTeacher(teacher, self.trainable_module, path=path, device=self.device, dtype=self.dtype)
        own = {id(parameter) for parameter in self.trainable_module.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ValueError("The teacher shares parameters with the model: pass a copy of the model, or 'ema'.")
        return teacher if isinstance(teacher, (EMATeacher, PretrainedTeacher)) else FrozenTeacher(teacher)

    @property
    def active(self) -> bool:
        """Whether the current epoch can have MultiMix batches."""
        return self.schedule.is_active(self.epoch)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Parts of the loss that forward returns: 'dense', 'pooled', 'clean' on MultiMix batches, 'plain' on others."""
        if self.schedule.prob == 0:
            return ()
        dense = self.mode == 'dense' and self.loss.pooled_weight < 1
        pooled = self.mode == 'pooled' or self.loss.pooled_weight > 0
        clean_weight = self.loss.clean_weight
        shown = dict(
            dense=dense and clean_weight < 1, pooled=pooled and clean_weight < 1, clean=clean_weight > 0,
            plain=self.schedule.alternates)
        return tuple(name for name, is_shown in shown.items() if is_shown)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that start_epoch, off_epoch and the distillation ramp refer to. Call it before every epoch."""
        self.epoch = epoch
        if self.distillation is not None:
            self.distillation.set_epoch(epoch)

    def _decide(self, multimix: bool | None) -> bool:
        """Whether this batch is a MultiMix batch."""
        if multimix is not None:
            return multimix
        if not self.schedule.alternates:
            return self.active
        if not self._is_training:
            return False
        self.num_batches += 1
        return self.schedule.is_multimix(self.epoch, self.num_batches - 1)

    @property
    def _is_training(self) -> bool:
        return unwrap_model(self.trainable_module).training

    def forward(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            multimix: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """Forward pass and loss.

        Args:
            input: Images (b, c, h, w); of two views (b, 2c, h, w).
            target: Class indices (b,), or soft or multi-hot targets (b, c).
            multimix: Whether this is a MultiMix batch, decided by the loader that mixes images. None lets the task
                decide.

        Returns:
            'loss'; 'output', the ordinary logits; and the parts of the loss in loss_names that this batch has,
            detached, for logging.
        """
        input, teacher_input = split_views(input) if self.views == 2 else (input, input)
        is_multimix = self._decide(multimix)
        if self._handle is not None:
            self._handle.enabled = is_multimix
        teaches = is_multimix and self._is_training and self.teacher is not None and self.distillation.weight > 0
        # The teacher goes first: it keeps nothing, and the student's activations are not there yet.
        teacher_output = self.teacher(teacher_input) if teaches else None
        output = self.trainable_module(input)
        if not isinstance(output, MultiMixOutput):  # a batch without MultiMix, or the task is in evaluation mode
            loss = self.criterion(output, target)
            parts = {'plain': loss.detach()} if self.schedule.alternates else {}
            return {'loss': loss, 'output': output, **parts}
        output = _without_overflow(output)
        loss = self.distillation or self.loss
        terms = loss.terms(output, self._mixable(target, output.logits), teacher_output)
        if getattr(self.criterion, 'sum_classes', False):
            terms = {name: term * output.logits.shape[-1] for name, term in terms.items()}
        parts = {name: term.detach() for name, term in terms.items() if name != 'loss'}
        if self._leaves_class_token:
            # Every parameter takes part in every batch, as DistributedDataParallel requires.
            terms['loss'] = terms['loss'] + 0 * output.logits.sum()
        return {'loss': terms['loss'], 'output': output.logits, **parts}

    @property
    def _owns_average(self) -> bool:
        """Whether the teacher is an average of its own, and not the one that timm's task keeps."""
        shared = self.get_trainable_module(ema=True)
        return isinstance(self.teacher, EMATeacher) and self.teacher.average is not shared

    def setup_ema(self, decay: float = 0.9999, use_warmup: bool = False, device=None, **kwargs) -> nn.Module:
        """Keep an average of the weights, as timm does. With the decay of the teacher it is the teacher, too."""
        average = super().setup_ema(decay, use_warmup, device, **kwargs)
        if isinstance(self.teacher, EMATeacher) and self.teacher.average.decay == decay and device is None:
            attach(average.module, **self._attach_options)
            self.teacher = EMATeacher.of_average(average)
        return average

    def update_ema(self, step: int | None = None) -> None:
        """Move the averages towards the weights, after every step of the optimizer."""
        super().update_ema(step)
        if self._owns_average:
            self.teacher.update(self.trainable_module)

    def get_eval_teacher(self) -> nn.Module | None:
        """The model to validate for a teacher that learns; None without one."""
        return self.teacher.module if isinstance(self.teacher, EMATeacher) else None

    def compile(self, backend: str = 'inductor', mode: str | None = None, **kwargs) -> nn.Module:
        """Compile student and teacher."""
        if self.teacher is not None:
            self.teacher.compile(backend=backend, mode=mode, **kwargs)
        return super().compile(backend, mode, **kwargs)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> 'MultiMixTask':
        """Wrap the student for distribution. Teachers are not wrapped: nothing flows back to them."""
        super().prepare_distributed(device_ids, **ddp_kwargs)
        if self._owns_average:  # the student's weights are those of the first process from now on
            for tensor in self.teacher.module.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        return self

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn=unwrap_model) -> dict[str, Any]:
        """timm's entries, and with a teacher that is an average of its own 'state_dict_teacher': plain timm weights."""
        state = super().get_checkpoint_state(ema, unwrap_fn)
        if self._owns_average and not ema:
            state['state_dict_teacher'] = self.teacher.module.state_dict()
        return state

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """State for resuming: the teacher, and the number of batches that the task has assigned itself.

        The teacher's weights are those of the checkpoint, which torch.save writes once.
        """
        if ema:
            return {}
        state = {'num_batches': self.num_batches} if self.schedule.alternates else {}
        return {**state, 'teacher': self.teacher.state_dict()} if self._owns_average else state

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Restore get_task_state. Without one, the teacher begins at the weights just loaded."""
        if ema:
            return
        self.num_batches = int((state or {}).get('num_batches', 0))
        if not self._owns_average:
            return
        if state and 'teacher' in state:
            self.teacher.load_state_dict(state['teacher'], strict=strict)
        else:
            self.teacher.set(self.trainable_module)

    def _mixable(self, target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Targets as timm's BinaryCrossEntropy reads them, so that those are mixed; others as they are."""
        criterion = self.criterion
        if not isinstance(criterion, BinaryCrossEntropy):
            return target
        if target.ndim == 1:
            target = class_rows(target, logits.shape[-1], criterion.smoothing)
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

    def forward(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            multimix: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """Forward pass and loss, as MultiMixTask; targets are floating point (b, c)."""
        if target.ndim != 2 or not target.is_floating_point():
            raise ValueError(
                f'Multi-label targets must be floating point (b, c), got {target.dtype} with shape '
                f'{tuple(target.shape)}.')
        return super().forward(input, target, multimix)
