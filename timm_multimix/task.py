"""MultiMix training tasks: subclasses of timm's classification tasks that use the MultiMix loss."""
import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy
from timm.task import ClassificationTask, MultiLabelClassificationTask
from timm.utils import unwrap_model
from torch import nn

from .build.criteria import check_num_classes, loss_options
from .data.alternation import BatchSchedule
from .data.views import split_views
from .dense.hook import attach, detach
from .losses.attention import check_attention
from .losses.module import MultiMixLoss, MultiMixOutput
from .losses.targets import class_rows
from .teacher import EMATeacher, FrozenTeacher, PretrainedTeacher, SelfDistillationLoss, check_teacher

_logger = logging.getLogger(__name__)

TASK_MODES = ('off', 'pooled', 'dense')
# Default probability of a MultiMix batch for each preset of MultiMixLoss.
PRESET_PROB = {'default': 1.0, 'paper': 0.5}
_UNTRAINED_TOKEN = (
    'The dense loss does not train the class token that this model predicts from: set pooled_weight or clean_weight '
    'above 0, or for example prob=0.5.')


def _check_mode(mode: str, teacher: str | nn.Module) -> None:
    if mode not in TASK_MODES:
        raise ValueError(f'mode must be one of {", ".join(TASK_MODES)}, got {mode!r}.')
    if mode == 'off' and teacher != 'none':
        raise ValueError("mode='off' does not use a teacher: set teacher='none'.")


def _check_not_given(options: dict[str, Any], of_criterion: dict[str, Any]) -> None:
    if given := options.keys() & of_criterion.keys():
        raise TypeError(
            f'{", ".join(sorted(given))}: MultiMixTask takes this from the criterion. Set criterion or '
            'criterion_kwargs.')


class MultiMixTask(ClassificationTask):
    """Train a timm model with MultiMix.

    It replaces timm's ClassificationTask. On a MultiMix batch the model returns its ordinary logits and the logits at
    every position (see attach), and MultiMixLoss mixes them. ClassificationTask trains the other batches, at its usual
    cost. Checkpoints contain the plain state_dict of the model. Validation, EMA, compilation and distributed training
    work as in timm.

    With prob < 1 every batch is assigned at random. With probability prob it is a MultiMix batch, otherwise it is
    trained with the plain criterion, usually on mixed images, and images of MultiMix batches must not be mixed. A loop
    that mixes images therefore decides (see BatchSchedule) and passes the decision to forward(). Otherwise the task
    decides from its seed and its number of training batches, which is part of its state.

    Args:
        model: The timm model to train. The task attaches it.
        criterion: The plain loss. MultiMix uses the same kind of loss (softmax or binary) and label smoothing.
        criterion_kwargs: Arguments of timm's create_classification_loss() if criterion is None.
        mode: 'dense' (mix the logits at every position), 'pooled' (mix the ordinary logits), or 'off'.
        preset: 'default', or 'paper' for the settings of the papers: see MultiMixLoss, and prob=0.5.
        prob: Probability of a MultiMix batch. None is 1, or 0.5 with preset='paper'.
        seed: Seed of the decisions of the task for prob < 1.
        attention: Query of the attention over positions: 'uniform', 'gap', 'token' or 'cam' (dense mode only).
        attention_norm: 'relu' or 'softmax'.
        start_epoch: First epoch with MultiMix, counted from 0.
        off_epoch: Epoch from which MultiMix is disabled. 0 never disables it, as timm's mixup_off_epoch.
        teacher: 'none', 'ema' (the average of the model, see EMATeacher), the name of a timm model with pretrained
            weights, or a module that maps images to logits or to a MultiMixOutput. The module is frozen and set to
            evaluation mode.
        teacher_decay: Decay of the 'ema' teacher.
        teacher_path: Checkpoint of a named teacher.
        distill_weight: Weight of the distillation loss, in [0, 1].
        distill_temperature: Temperature that divides the logits of student and teacher in the distillation loss.
        distill_ramp_epochs: Number of epochs over which the weight increases from 0, if set_epoch is called.
        views: Number of views of each image. With 2, images are (b, 2c, h, w): the first view is the input of the
            student, the second the input of the teacher (see timm_multimix.data.views).
        device: Device for task tensors and buffers.
        dtype: Dtype for task tensors and buffers.
        verbose: Log the settings.
        **options: Options of MultiMixLoss, such as num_mixes, alpha, tuple_length, balance, pooled_weight or
            clean_weight.

    Raises:
        ValueError: If an option is out of range, the head cannot be applied at a position, or the criterion has no
            mixed form.
        TypeError: If the model does not follow timm's protocol, or an option is unknown.

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
            **options: Any,
    ):
        _check_mode(mode, teacher)
        prob = PRESET_PROB.get(preset, 1.0) if prob is None else prob
        schedule = BatchSchedule(prob, seed, start_epoch, off_epoch)
        check_attention(attention, attention_norm)
        check_teacher(teacher, teacher_decay, teacher_path, views)
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.mode, self.views = mode, views
        self.schedule = schedule if mode != 'off' else BatchSchedule(prob=0)
        self.epoch = self.num_batches = 0  # num_batches counts the batches that the task assigned itself
        # The loss computes the 'cam' attention, since it needs the target. The model computes the others.
        in_loss = mode == 'dense' and attention == 'cam'
        in_model = attention if mode == 'dense' and not in_loss else 'uniform'
        self._attach_options = dict(mode=mode, attention=in_model, attention_norm=attention_norm)
        detach(model)
        self._handle = self.loss = self.distillation = self.teacher = None
        check_num_classes(self.criterion, getattr(unwrap_model(model), 'num_classes', None))
        # With mode='off' the loss is not used, but its options are checked.
        kind = dict(loss_type='ce', smoothing=0.0) if mode == 'off' else loss_options(self.criterion)
        _check_not_given(options, kind)
        loss = MultiMixLoss(
            **kind, preset=preset, attention='cam' if in_loss else None, attention_norm=attention_norm, **options)
        distillation = SelfDistillationLoss(loss, distill_weight, distill_temperature, distill_ramp_epochs)
        if mode != 'off':
            self.loss = loss
            self._handle = attach(unwrap_model(self.trainable_module), **self._attach_options)
            if self.schedule.prob == 1 and self._leaves_class_token:
                raise ValueError(_UNTRAINED_TOKEN)
            if teacher != 'none':
                self.distillation = distillation
                self.teacher = self._make_teacher(teacher, teacher_decay, teacher_path)
        self._terms = (self.distillation or loss).terms
        if verbose and mode != 'off':
            _logger.info(
                f'{type(self).__name__}: mode={mode}, prob={prob}, attention={attention}, {self.loss.extra_repr()}')

    @property
    def _leaves_class_token(self) -> bool:
        """Whether the model predicts from a class token that MultiMix batches do not train."""
        positions_only = self.mode == 'dense' and self.loss.pooled_weight == 0 == self.loss.clean_weight
        return positions_only and not self._handle.reads_positions

    def _make_teacher(self, teacher: str | nn.Module, decay: float, path: str | None) -> nn.Module:
        if teacher == 'ema':
            return EMATeacher(self.trainable_module, decay)
        if isinstance(teacher, str):
            return PretrainedTeacher(teacher, self.trainable_module, path=path, device=self.device, dtype=self.dtype)
        own = {id(parameter) for parameter in self.trainable_module.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ValueError("The teacher shares parameters with the model: pass a copy of the model, or 'ema'.")
        return teacher if isinstance(teacher, (EMATeacher, PretrainedTeacher)) else FrozenTeacher(teacher)

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, for start_epoch, off_epoch and the distillation ramp. Call it before every epoch."""
        self.epoch = epoch
        if self.distillation is not None:
            self.distillation.set_epoch(epoch)

    def _decide(self, multimix: bool | None) -> bool:
        """Whether this batch is a MultiMix batch."""
        if multimix is not None:
            return multimix
        if not self.schedule.alternates:
            return self.schedule.is_active(self.epoch)
        if not unwrap_model(self.trainable_module).training:
            return False
        self.num_batches += 1
        return self.schedule.is_multimix(self.epoch, self.num_batches - 1)

    def forward(
            self,
            input: torch.Tensor | dict[str, torch.Tensor],
            target: torch.Tensor,
            multimix: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """Forward pass and loss.

        Args:
            input: Images (b, c, h, w), or (b, 2c, h, w) with two views, or a batch of timm's NaFlex loader.
            target: Class indices (b,), or soft or multi-hot targets (b, c).
            multimix: Whether this is a MultiMix batch. If None, the task decides.

        Returns:
            'loss', 'output' (the ordinary logits), and the loss terms of this batch, detached, for logging: 'dense',
            'pooled' and 'clean' on a MultiMix batch, 'plain' on the other batches if prob < 1.
        """
        if self.multi_label and (target.ndim != 2 or not target.is_floating_point()):
            raise ValueError(
                f'Multi-label targets must be floating point (b, c), got {target.dtype} with shape '
                f'{tuple(target.shape)}.')
        input, teacher_input = split_views(input) if self.views == 2 else (input, input)
        is_multimix = self._decide(multimix)
        if self._handle is not None:
            self._handle.enabled = is_multimix
        is_training = unwrap_model(self.trainable_module).training
        teaches = is_multimix and is_training and self.teacher is not None and self.distillation.weight > 0
        # The teacher runs first, while the student's activations are not yet in memory.
        teacher_output = self.teacher(teacher_input) if teaches else None
        output = self.trainable_module(input)
        if not isinstance(output, MultiMixOutput):  # batch without MultiMix, or evaluation mode
            loss = self.criterion(output, target)
            parts = {'plain': loss.detach()} if self.schedule.alternates else {}
            return {'loss': loss, 'output': output, **parts}
        # A loss that computes its own attention ignores that of the output, whose zeros only mark the padding.
        mask = output.attention > 0 if self.loss.attention == 'cam' and output.attention is not None else None
        terms = self._terms(output, self._mixable(target, output.logits), teacher_output, mask=mask)
        if getattr(self.criterion, 'sum_classes', False):
            terms = {name: term * output.logits.shape[-1] for name, term in terms.items()}
        parts = {name: term.detach() for name, term in terms.items() if name != 'loss'}
        if self._leaves_class_token:
            # DistributedDataParallel requires a gradient for every parameter.
            terms['loss'] = terms['loss'] + 0 * output.logits.sum()
        return {'loss': terms['loss'], 'output': output.logits, **parts}

    @property
    def _owns_average(self) -> bool:
        """Whether the teacher is an average separate from timm's EMA model."""
        shared = self.get_trainable_module(ema=True)
        return isinstance(self.teacher, EMATeacher) and self.teacher.average is not shared

    def setup_ema(
            self, decay: float = 0.9999, use_warmup: bool = False, device: Any = None, **kwargs: Any) -> nn.Module:
        """Set up timm's EMA model. If its decay equals the decay of the 'ema' teacher, it is also the teacher."""
        average = super().setup_ema(decay, use_warmup, device, **kwargs)
        if isinstance(self.teacher, EMATeacher) and self.teacher.average.decay == decay and device is None:
            attach(average.module, **self._attach_options)
            self.teacher = EMATeacher(average)
        return average

    def update_ema(self, step: int | None = None) -> None:
        """Update the averages. Call it after every optimizer step."""
        super().update_ema(step)
        if self._owns_average:
            self.teacher.update(self.trainable_module)

    def get_eval_teacher(self) -> nn.Module | None:
        """Return the averaged model of an 'ema' teacher, for validation, or None."""
        return self.teacher.module if isinstance(self.teacher, EMATeacher) else None

    def compile(  # type: ignore[override]  # as in timm's TrainingTask
            self, backend: str = 'inductor', mode: str | None = None, **kwargs: Any) -> nn.Module:
        """Compile the student and its teacher. Without a teacher, and not on a CPU, also compile the loss."""
        if self.teacher is not None:
            self.teacher.compile(backend=backend, mode=mode, **kwargs)
        elif self.device.type != 'cpu':  # on a CPU the loss has many small tiles, and the compiler unrolls the loop
            # Not compiled with a teacher, because each new weight of the ramp would compile it again. Without `mode`,
            # because the next replay of a CUDA graph would overwrite the terms.
            self._terms = torch.compile(self._terms, backend=backend, **kwargs)
        return super().compile(backend, mode, **kwargs)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'MultiMixTask':
        """Wrap the student for distributed training. The teacher has no gradient and is not wrapped."""
        super().prepare_distributed(device_ids, **ddp_kwargs)
        if self._owns_average:  # DDP has copied the student's weights from rank 0
            for tensor in self.teacher.module.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        return self

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Callable = unwrap_model) -> dict[str, Any]:
        """Return timm's entries, and the weights of a separate 'ema' teacher as 'state_dict_teacher'."""
        state = super().get_checkpoint_state(ema, unwrap_fn)
        if self._owns_average and not ema:
            state['state_dict_teacher'] = self.teacher.module.state_dict()
        return state

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state for resuming: the teacher, and the number of batches that the task assigned itself.

        The teacher's weights share storage with 'state_dict_teacher', so torch.save writes them once.
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
        """Load the state of get_task_state. If it has no teacher, the teacher starts from the model's weights."""
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
        """Apply the smoothing and the threshold of the criterion to the targets before they are mixed.

        MultiMixLoss smooths class indices for softmax cross-entropy. PyTorch smooths soft targets too, timm does not.
        """
        criterion = self.criterion
        if isinstance(criterion, nn.CrossEntropyLoss) and target.is_floating_point() and criterion.label_smoothing:
            return target * (1 - criterion.label_smoothing) + criterion.label_smoothing / logits.shape[-1]
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
        threshold: Minimum probability of a predicted label, for the F1 score of the evaluator.
        **options: Arguments of MultiMixTask.

    Raises:
        ValueError: If the threshold is not in (0, 1).
    """

    def __init__(self, model: nn.Module, *args: Any, threshold: float = 0.5, **options: Any):
        if not 0 < threshold < 1:
            raise ValueError(f'threshold must be in (0, 1), got {threshold}.')
        super().__init__(model, *args, **options)
        self.threshold = threshold
