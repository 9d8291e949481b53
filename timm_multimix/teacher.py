"""Self-distillation (P1, sec. 3.3): a teacher that is the average of the student, and the loss that learns from it."""
from typing import Any

import torch
from timm.task.distillation import DistillationTeacher
from timm.utils import ModelEmaV3, unwrap_model
from torch import nn

from .dense.hook import outputs_in_evaluation
from .losses.functional import check_distillation
from .losses.module import MultiMixLoss, MultiMixOutput


def check_teacher(teacher: str | nn.Module, decay: float, path: str | None, views: int) -> None:
    """Check a task's options for its teacher.

    Raises:
        TypeError: if the teacher is neither a name nor a module.
        ValueError: for an option that is out of range or would have no effect.
    """
    if not isinstance(teacher, (str, nn.Module)):
        raise TypeError(
            f"teacher must be 'none', 'ema', the name of a timm model or a torch.nn.Module, got {teacher!r}.")
    if not 0 <= decay < 1:
        raise ValueError(f'The decay of a teacher is a share below 1, got {decay}.')
    if views not in (1, 2):
        raise ValueError(f'An image has 1 view or 2, got {views}.')
    if views == 2 and teacher == 'none':
        raise ValueError("The second view is for a teacher, and there is none: take teacher 'ema', or 1 view.")
    if path and (teacher in ('none', 'ema') or not isinstance(teacher, str)):
        raise ValueError(f'{path} is for a teacher that is named, got {teacher!r}.')


class EMATeacher(nn.Module):
    """The exponential moving average of a student, as its teacher; timm's ModelEmaV3 that answers as the student does.

    It predicts in evaluation mode, without gradient. BatchNorm's running statistics are averaged as the weights are:
    they describe the teacher's own features, if not quite exactly.

    Args:
        model: The student, attached before if it is (then the teacher returns a MultiMixOutput, too). Its weights are
            the first average. Compiled and distributed ones are unwrapped.
        decay: Share of the average that an update keeps.
        use_warmup: Keep less at first: update t keeps at most 1 - (1 + t)^(-2/3). Without it the teacher is the
            initial model for about 1 / (1 - decay) updates.
        **options: Of timm's ModelEmaV3.

    Raises:
        ValueError: if the decay is not a share.

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

    def __init__(self, model: nn.Module, decay: float = 0.999, use_warmup: bool = True, **options):
        super().__init__()
        check_teacher('ema', decay, None, 1)
        self._hold(ModelEmaV3(unwrap_model(model), decay=decay, use_warmup=use_warmup, **options))

    def _hold(self, average: ModelEmaV3) -> None:
        self.average = average
        self.num_updates = 0
        average.module.requires_grad_(False)

    @classmethod
    def of_average(cls, average: ModelEmaV3) -> 'EMATeacher':
        """A teacher that is an average which somebody else updates and saves."""
        teacher = cls.__new__(cls)
        nn.Module.__init__(teacher)
        teacher._hold(average)
        return teacher

    @property
    def module(self) -> nn.Module:
        """The averaged model."""
        return self.average.module

    def train(self, mode: bool = True) -> 'EMATeacher':
        """A teacher stays in evaluation mode, whatever the module that holds it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> MultiMixOutput | torch.Tensor:
        """What the averaged model predicts: of the kind that the student returns while training."""
        if self.module.training:
            self.module.eval()
        with outputs_in_evaluation(self.module):
            return self.module(images)

    def compile(self, *args, **kwargs) -> None:
        """Compile the averaged model, with arguments of torch.compile."""
        self.module.compile(*args, **kwargs)

    def set(self, model: nn.Module) -> None:
        """Make the average what the student is."""
        self.average.set(unwrap_model(model))

    def update(self, model: nn.Module) -> None:
        """Move the average towards the student. Call it after every step of the optimizer."""
        self.num_updates += 1
        self.average.update(unwrap_model(model), step=self.num_updates)

    def get_extra_state(self) -> dict[str, Any]:
        """What goes into state_dict beside weights: the number of updates, and what rounds averages of bfloat16."""
        return dict(num_updates=self.num_updates, rounding=self.average._sr_generator.get_state())

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore get_extra_state."""
        self.num_updates = int(state['num_updates'])
        self.average._sr_generator.set_state(state['rounding'].cpu())


class FrozenTeacher(nn.Module):
    """A module as a teacher: in evaluation mode, with frozen parameters, and without gradient.

    Args:
        module: Maps images to logits or to a MultiMixOutput. Its parameters are frozen here.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'FrozenTeacher':
        """A teacher stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> MultiMixOutput | torch.Tensor:
        """The output of the module: a MultiMixOutput if it is an attached model."""
        if any(module.training for module in self.module.modules()):
            self.module.eval()
        with outputs_in_evaluation(self.module):
            return self.module(images)

    def compile(self, *args, **kwargs) -> None:
        """Compile the module, with arguments of torch.compile."""
        self.module.compile(*args, **kwargs)


def _per_channel(values: torch.Tensor, channels: int) -> torch.Tensor:
    """Pixel statistics as (1, channels, 1, 1); if their number differs, their average, as timm's adapt_to_chs."""
    values = values.flatten()
    values = values if len(values) == channels else values.mean().expand(channels)
    return values.view(1, -1, 1, 1)


class PretrainedTeacher(nn.Module):
    """Another timm model as a teacher. It returns ordinary logits (b, c).

    Args:
        model: Name of a timm model, created with its pretrained weights; or a model.
        student: The student, whose number of classes and of input channels the teacher gets.
        path: Checkpoint with the weights of a named model.
        mean: Mean that the images are normalised with for the student, by default that of its pretrained_cfg. Images
            are normalised again for the teacher. As in timm, a mean for another number of channels is replaced by its
            average.
        std: Standard deviation, likewise.
        device: Device of the teacher.
        dtype: Dtype of the teacher, None for float32.

    Raises:
        ValueError: if the teacher is a model with another number of classes or of input channels than the student.
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
        super().__init__()
        student = unwrap_model(student)
        if device is None and isinstance(model, nn.Module):
            device = next(model.parameters()).device
        self.teacher = DistillationTeacher(
            model, student.num_classes, student.in_chans, pretrained_path=path, device=device, dtype=dtype)
        classes = getattr(self.teacher.model, 'num_classes', student.num_classes)
        if classes != student.num_classes:
            raise ValueError(f'The teacher tells {classes} classes apart, and the student {student.num_classes}.')
        channels = getattr(self.teacher.model, 'in_chans', student.in_chans)
        if channels != student.in_chans:
            raise ValueError(
                f'The teacher takes images with {channels} channels, and the student with {student.in_chans}: create '
                f'the teacher with in_chans={student.in_chans}.')
        self.teacher.requires_grad_(False)
        cfg = getattr(student, 'pretrained_cfg', None) or {}
        options = dict(device=device, dtype=dtype)
        own_mean, own_std = (
            _per_channel(value, channels) for value in (self.teacher.mean_kd, self.teacher.std_kd))
        mean, std = (
            own if given is None else _per_channel(torch.tensor(given, **options), channels)
            for given, own in ((mean or cfg.get('mean'), own_mean), (std or cfg.get('std'), own_std)))
        self.register_buffer('scale', std / own_std, persistent=False)
        self.register_buffer('shift', (mean - own_mean) / own_std, persistent=False)

    def train(self, mode: bool = True) -> 'PretrainedTeacher':
        """A teacher stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (b, c) of images (b, c, h, w) that are normalised for the student."""
        output = self.teacher(images * self.scale + self.shift)
        return output[0] if isinstance(output, (tuple, list)) else output

    def compile(self, *args, **kwargs) -> None:
        """Compile the teacher, with arguments of torch.compile."""
        self.teacher.model.compile(*args, **kwargs)


class SelfDistillationLoss(nn.Module):
    """MultiMixLoss with a teacher. The share of distillation can grow over the first epochs (P1, sec. 3.3, eq. 9).

    Every term of the loss becomes a convex combination of classification, H(Ỹ, P̃), and distillation, H(P̃', P̃). The
    logits of student and teacher are mixed with the same weights, attended with the student's attention.

    Args:
        loss: The MultiMix loss.
        distill_weight: Share of distillation, in [0, 1]; 0 is the loss without a teacher, to the bit.
        distill_temperature: Divides the logits of both sides in the distillation term, which is multiplied by its
            square, as in timm's LogitDistillationTask.
        ramp_epochs: Epochs over which the share grows from 0, for a teacher that knows nothing at first. Tell the epoch
            with set_epoch.

    Shapes:
        output: what an attached student returned, or logits (b, c).
        target: class indices (b,), or soft or multi-hot targets (b, c).
        teacher: what the teacher returned for the same examples, or another view of them.
        Returns a scalar.

    Raises:
        ValueError: for options out of range, and for inputs whose shapes do not fit.
    """

    def __init__(
            self,
            loss: MultiMixLoss,
            distill_weight: float = 0.25,
            distill_temperature: float = 1.0,
            ramp_epochs: int = 0,
    ):
        super().__init__()
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
        """Say which epoch it is, counted from 0; before the first call the ramp counts as over."""
        self.epoch = epoch

    @property
    def weight(self) -> float:
        """Share of distillation in this epoch."""
        return self.distill_weight * min(1.0, self.epoch / self.ramp_epochs if self.ramp_epochs else 1.0)

    def forward(
            self,
            output: MultiMixOutput | torch.Tensor,
            target: torch.Tensor,
            teacher: MultiMixOutput | torch.Tensor,
    ) -> torch.Tensor:
        return self.terms(output, target, teacher)['loss']

    def terms(
            self,
            output: MultiMixOutput | torch.Tensor,
            target: torch.Tensor,
            teacher: MultiMixOutput | torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The loss and what it is made of, as MultiMixLoss.terms."""
        return self.loss.terms(
            output, target, teacher, distill_weight=self.weight, distill_temperature=self.distill_temperature)
