"""Teachers and the distillation loss (P1, sec. 3.3)."""
from typing import Any

import torch
from timm.task.distillation import DistillationTeacher
from timm.utils import ModelEmaV3, unwrap_model
from torch import nn

from .dense.hook import outputs_in_evaluation
from .losses.fused import check_distillation
from .losses.module import MultiMixLoss, MultiMixOutput


def check_teacher(teacher: str | nn.Module, decay: float, path: str | None, views: int) -> None:
    """Check the teacher options of MultiMixTask."""
    if not isinstance(teacher, (str, nn.Module)):
        raise TypeError(
            f"teacher must be 'none', 'ema', the name of a timm model or a torch.nn.Module, got {teacher!r}.")
    if not 0 <= decay < 1:
        raise ValueError(f'teacher_decay must be in [0, 1), got {decay}.')
    if views not in (1, 2):
        raise ValueError(f'views must be 1 or 2, got {views}.')
    if views == 2 and teacher == 'none':
        raise ValueError("views=2 requires a teacher: set teacher='ema' or views=1.")
    if path and (teacher in ('none', 'ema') or not isinstance(teacher, str)):
        raise ValueError(f'teacher_path {path} requires the name of a timm model as teacher, got {teacher!r}.')


class FrozenTeacher(nn.Module):
    """Teacher with frozen parameters, in evaluation mode and without gradient.

    Args:
        module: Module that maps images to logits or to a MultiMixOutput. Its parameters are frozen.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'FrozenTeacher':
        """Keep evaluation mode; the argument is ignored."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> MultiMixOutput | torch.Tensor:
        """Return the output of the module: a MultiMixOutput if it is an attached model, else logits (b, c)."""
        self.module.eval()
        with outputs_in_evaluation(self.module):
            return self.module(images)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the module. The arguments are passed to torch.compile."""
        self.module.compile(*args, **kwargs)


class EMATeacher(FrozenTeacher):
    """Teacher that is the exponential moving average of the student, based on timm's ModelEmaV3.

    It predicts in evaluation mode and without gradient. The running statistics of BatchNorm are averaged like the
    weights. They approximate the statistics of the teacher's features.

    Args:
        model: The student. Its weights are the initial average. If it is attached, the teacher returns a
            MultiMixOutput too. Wrappers for compilation and distribution are removed. An existing ModelEmaV3 is used
            as it is: its owner updates and saves it, and the options below have no effect.
        decay: Decay of the average, in [0, 1).
        use_warmup: Limit the decay of update t, counted from 0, to 1 - (1 + t)^(-2/3). Otherwise the teacher stays
            close to the initial model for about 1 / (1 - decay) updates.
        **options: Options of timm's ModelEmaV3.

    Raises:
        ValueError: If the decay is out of range.

    Examples:

        ```python
        teacher = EMATeacher(model)
        criterion = SelfDistillationLoss(MultiMixLoss())
        for images, target in loader:
            loss = criterion(model(images), target, teacher(images))
            ...
            optimizer.step()
            teacher.update(model)
        ```
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, use_warmup: bool = True, **options: Any):
        check_teacher('ema', decay, None, 1)
        nn.Module.__init__(self)
        if not isinstance(model, ModelEmaV3):
            model = ModelEmaV3(unwrap_model(model), decay=decay, use_warmup=use_warmup, **options)
        self.average = model
        self.num_updates = 0
        self.module.requires_grad_(False)

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The averaged model."""
        return self.average.module

    def set(self, model: nn.Module) -> None:
        """Set the average to the weights of the student."""
        self.average.set(unwrap_model(model))

    def update(self, model: nn.Module) -> None:
        """Update the average with the weights of the student. Call it after every optimizer step."""
        self.num_updates += 1
        self.average.update(unwrap_model(model), step=self.num_updates)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of updates and the state of the generator for stochastic rounding."""
        return dict(num_updates=self.num_updates, rounding=self.average._sr_generator.get_state())

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the state of get_extra_state."""
        self.num_updates = int(state['num_updates'])
        self.average._sr_generator.set_state(state['rounding'].cpu())


def _per_channel(values: torch.Tensor, channels: int) -> torch.Tensor:
    """Return pixel statistics (1, channels, 1, 1). As in timm, their mean is used if their number differs."""
    values = values.flatten()
    values = values if len(values) == channels else values.mean().expand(channels)
    return values.view(1, -1, 1, 1)


class PretrainedTeacher(FrozenTeacher):
    """Teacher that is another timm model. It returns ordinary logits (b, c).

    Args:
        model: A model, or the name of a timm model, which is created with its pretrained weights.
        student: The student. A named teacher is created with the same number of classes and input channels.
        path: Checkpoint with the weights of a named model.
        mean: Mean used to normalize the images for the student, by default from its pretrained_cfg. The teacher
            normalizes the images again with its own mean. As in timm, the average over channels is used if the number
            of channels differs.
        std: Standard deviation used to normalize the images for the student, as `mean`.
        device: Device of the teacher.
        dtype: Dtype of the teacher, None for float32.

    Raises:
        ValueError: If the teacher and the student differ in the number of classes or input channels.
    """

    def __init__(
            self,
            model: str | nn.Module,
            student: nn.Module,
            *,
            path: str | None = None,
            mean: tuple[float, ...] | None = None,
            std: tuple[float, ...] | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ):
        student = unwrap_model(student)
        if device is None and isinstance(model, nn.Module):
            device = next(model.parameters()).device
        teacher = DistillationTeacher(
            model, student.num_classes, student.in_chans, pretrained_path=path, device=device, dtype=dtype)
        super().__init__(teacher.model)
        for name, meaning in (('num_classes', 'classes'), ('in_chans', 'input channels')):
            own, required = getattr(self.module, name, getattr(student, name)), getattr(student, name)
            if own != required:
                raise ValueError(
                    f'The teacher has {own} {meaning} and the student has {required}: create the teacher with '
                    f'{name}={required}.')
        cfg = getattr(student, 'pretrained_cfg', None) or {}
        own_mean, own_std = (
            _per_channel(values, student.in_chans) for values in (teacher.mean_kd, teacher.std_kd))
        mean, std = cfg.get('mean') if mean is None else mean, cfg.get('std') if std is None else std
        mean, std = (
            own if given is None else _per_channel(
                torch.as_tensor(given, device=device, dtype=dtype or torch.float32), student.in_chans)
            for given, own in ((mean, own_mean), (std, own_std)))
        self.register_buffer('scale', std / own_std, persistent=False)
        self.register_buffer('shift', (mean - own_mean) / own_std, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits (b, c) for images (b, c, h, w) that are normalized for the student."""
        output: Any = super().forward(images * self.scale + self.shift)
        return output[0] if isinstance(output, (tuple, list)) else output


class SelfDistillationLoss(nn.Module):
    """MultiMixLoss with distillation from a teacher (P1, sec. 3.3, eq. 9).

    Every term of the loss becomes a convex combination of classification, H(Ỹ, P̃), and distillation, H(P̃', P̃). The
    logits of student and teacher are mixed with the same weights, attended with the student's attention.

    Args:
        loss: The MultiMix loss.
        distill_weight: Weight of distillation, in [0, 1]. With 0 the loss is identical to `loss` without a teacher.
        distill_temperature: Temperature that divides the logits of student and teacher in the distillation term. The
            term is multiplied by its square, as in timm's LogitDistillationTask.
        ramp_epochs: Number of epochs over which the weight increases linearly from 0. It requires calls of set_epoch.

    Raises:
        ValueError: If an option is out of range, or the shapes of the inputs do not match.
    """

    def __init__(
            self,
            loss: MultiMixLoss,
            distill_weight: float = 0.25,
            distill_temperature: float = 1.0,
            ramp_epochs: int = 0,
    ):
        super().__init__()
        if not isinstance(loss, MultiMixLoss):
            raise TypeError(f'SelfDistillationLoss requires a MultiMixLoss, got {type(loss).__name__}.')
        check_distillation(distill_weight, distill_temperature)
        if ramp_epochs < 0:
            raise ValueError(f'ramp_epochs must not be negative, got {ramp_epochs}.')
        self.loss = loss
        self.distill_weight = distill_weight
        self.distill_temperature = distill_temperature
        self.ramp_epochs = ramp_epochs
        self.epoch = ramp_epochs

    def extra_repr(self) -> str:
        return f'distill_weight={self.distill_weight}, distill_temperature={self.distill_temperature}'

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, counted from 0. Before the first call the weight is distill_weight."""
        self.epoch = epoch

    @property
    def weight(self) -> float:
        """Weight of distillation in the current epoch."""
        return self.distill_weight * min(1.0, self.epoch / self.ramp_epochs if self.ramp_epochs else 1.0)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss. The arguments are those of `terms`."""
        return self.terms(*args, **kwargs)['loss']

    def terms(
            self,
            output: MultiMixOutput | torch.Tensor,
            target: torch.Tensor | None,
            teacher: MultiMixOutput | torch.Tensor | None,
            *,
            mask: torch.Tensor | None = None,
            dense_target: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the loss and its terms. See MultiMixLoss.terms."""
        return self.loss.terms(
            output, target, teacher, mask=mask, dense_target=dense_target, distill_weight=self.weight,
            distill_temperature=self.distill_temperature)
