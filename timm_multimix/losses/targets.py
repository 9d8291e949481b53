"""Targets of the losses, class weights, and the validation of both."""
import math
from typing import NamedTuple

import torch

from .weights import is_eager_cpu


# _replace and _asdict are not used below, because torch.compile of PyTorch 2.6 does not trace them.
class Targets(NamedTuple):
    """Targets of the loss and their weights.

    Attributes:
        rows: Target rows (b, c), or rows at every position (b, r, c).
        normalizer: Weights of the examples in the divisor of the mean, (b,) or (b, r). None is 1 for every mix.
        teacher: The teacher's logits (b, r, c) or (b, 1, c), or None.
        weight: Class weights of the terms of the loss (c,), or None.
        pos_weight: Class weights of the positive terms of binary cross-entropy (c,), or None.
    """
    rows: torch.Tensor
    normalizer: torch.Tensor | None = None
    teacher: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    pos_weight: torch.Tensor | None = None

    def at(self, positions: slice) -> 'Targets':
        """Select positions and move them to the front: rows (b, c) or (p, b, c), normalizer (b,) or (p, 1, b)."""
        rows, normalizer = self.rows, self.normalizer
        if rows.ndim == 3:
            rows = rows[:, positions].transpose(0, 1)
        if normalizer is not None and normalizer.ndim == 2:
            normalizer = normalizer[:, positions].mT.unsqueeze(1)
        return Targets(rows, normalizer, self.teacher, self.weight, self.pos_weight)

    def to(self, dtype: torch.dtype) -> 'Targets':
        """Convert all tensors except the teacher's logits, which are converted when they are used."""
        normalizer, weight, pos_weight = (
            None if tensor is None else tensor.to(dtype)
            for tensor in (self.normalizer, self.weight, self.pos_weight))
        return Targets(self.rows.to(dtype), normalizer, self.teacher, weight, pos_weight)

    def factors(self, rows: torch.Tensor, is_binary: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of the logits (..., c) and of A (..., 1 or c) in the loss of target rows (..., c)."""
        linear = rows if self.pos_weight is None else rows * self.pos_weight
        if self.weight is not None:
            linear = linear * self.weight
        if not is_binary:
            return linear, linear.sum(dim=-1, keepdim=True)
        if linear is rows:
            return rows, torch.ones_like(rows[..., :1])
        return linear, linear + (1 - rows) * (1 if self.weight is None else self.weight)


def loss_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of computations with a tensor: float64 for float64, otherwise float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def class_rows(target: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Convert targets to rows (..., c). As in timm, smoothing applies to class indices only."""
    if target.is_floating_point():
        return target.detach()
    off_value = smoothing / num_classes
    rows = torch.full((*target.shape, num_classes), off_value, device=target.device)
    return rows.scatter_(-1, target.unsqueeze(-1), 1 - smoothing + off_value)


def check_target(
        target: torch.Tensor,
        logits_shape: torch.Size,
        is_binary: bool,
        name: str = 'target',
) -> torch.Tensor:
    """Check targets of examples for logits (b, c), or of positions for logits (b, r, c), and cast multi-hot targets."""
    if is_binary and not target.is_floating_point() and target.ndim == len(logits_shape):
        target = target.float()
    if not logits_shape[0]:
        raise ValueError('The batch has no examples.')
    is_soft = target.is_floating_point()
    if target.shape != (logits_shape if is_soft else logits_shape[:-1]) or not (is_soft or target.dtype == torch.int64):
        axes = 'b, r' if len(logits_shape) == 3 else 'b,'
        raise ValueError(
            f'{name} must be int64 class indices with shape ({axes}) = {tuple(logits_shape[:-1])}, or floating point '
            f'with shape {tuple(logits_shape)}, got {target.dtype} with shape {tuple(target.shape)}.')
    return target


def check_target_values(target: torch.Tensor, num_classes: int) -> None:
    """Check that soft targets are not negative, or that class indices are in the range of the classes."""
    if not is_eager_cpu(target.device) or not target.numel():
        return
    low, high = target.min().item(), target.max().item()
    if target.is_floating_point():
        if not low >= 0:  # negated, to reject NaN too
            raise ValueError(f'Soft targets must not be negative, got {low}.')
    elif not 0 <= low <= high < num_classes:
        raise ValueError(
            f'Class indices must be in [0, {num_classes - 1}] for {num_classes} classes, got values from {low} to '
            f'{high}.')


def check_class_weights(**class_weights: torch.Tensor | None) -> None:
    """Check that class weights are finite and not negative. Values on devices other than the CPU are not checked."""
    for name, given in class_weights.items():
        # Negated, to reject NaN too.
        if given is not None and given.device.type == 'cpu' and not 0 <= given.min() <= given.max() < math.inf:
            raise ValueError(f'{name} must be finite and not negative, got {given.tolist()}.')


def make_targets(
        target: torch.Tensor,
        num_classes: int,
        smoothing: float,
        teacher: torch.Tensor | None,
        is_binary: bool,
        weight: torch.Tensor | None = None,
        pos_weight: torch.Tensor | None = None,
) -> Targets:
    """Return the targets of a loss. As in PyTorch, class weights normalize cross-entropy with class indices."""
    if not is_binary and pos_weight is not None:
        raise ValueError("pos_weight is for binary cross-entropy (loss_type='bce'): use weight.")
    for name, given in (('weight', weight), ('pos_weight', pos_weight)):
        if given is not None and tuple(given.shape) not in [(num_classes,), *([(1,), ()] if is_binary else [])]:
            raise ValueError(f'{name} must have shape (c,) = ({num_classes},), got {tuple(given.shape)}.')
    normalizer = None
    if not is_binary and not target.is_floating_point() and weight is not None:
        normalizer = weight[target]
    return Targets(class_rows(target, num_classes, smoothing), normalizer, teacher, weight, pos_weight)
