"""Targets of the losses and class weights."""
from typing import Any, NamedTuple

import torch


class ClassWeights(NamedTuple):
    """Weights of the classes (c,), or None.

    Attributes:
        weight: Weights of the terms of the loss.
        pos_weight: Weights of the positive terms of binary cross-entropy.
    """
    weight: torch.Tensor | None = None
    pos_weight: torch.Tensor | None = None

    def factors(self, target: torch.Tensor, is_binary: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the factors of the logits (..., c) and of A (..., 1 or c) in the loss of targets (..., c).

        None is a factor of A that is 1 for all classes.
        """
        linear = target if self.pos_weight is None else target * self.pos_weight
        if self.weight is not None:
            linear = linear * self.weight
        if not is_binary:
            return linear, linear.sum(dim=-1, keepdim=True)
        if linear is target:
            return target, None
        return linear, linear + (1 - target) * (1 if self.weight is None else self.weight)


class Targets(NamedTuple):
    """Targets of the loss and their weights.

    Attributes:
        rows: Target rows (b, c), or rows at every position (b, r, c).
        normalizer: Weights of the examples in the divisor of the mean, (b,) or (b, r). None is 1 for every mix.
        teacher: The teacher's logits (b, r, c) or (b, 1, c), or None.
        weight: See ClassWeights.
        pos_weight: See ClassWeights.
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
        return self._replace(rows=rows, normalizer=normalizer)

    def to(self, dtype: torch.dtype) -> 'Targets':
        """Convert all but the teacher's logits, which are converted when they are used."""
        entries: Any = (
            tensor if tensor is None or tensor is self.teacher else tensor.to(dtype) for tensor in self)
        return Targets(*entries)


def loss_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of computations with a tensor: float64 for float64, otherwise float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def multi_hot(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast integer or boolean multi-hot targets (b, c) to the dtype of the loss."""
    return target if target.is_floating_point() or target.ndim < 2 else target.to(dtype)


def class_rows(target: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Convert targets to rows (..., c). As in timm, smoothing applies to class indices only."""
    if target.is_floating_point():
        return target.detach()
    off_value = smoothing / num_classes
    rows = torch.full((*target.shape, num_classes), off_value, device=target.device)
    return rows.scatter_(-1, target.unsqueeze(-1), 1 - smoothing + off_value)


def check_class_weights(class_weights: ClassWeights, num_classes: int, is_binary: bool) -> ClassWeights:
    """Return the class weights with shape (c,).

    Raises:
        ValueError: If their shapes do not fit, or pos_weight is given for cross-entropy.
    """
    if not is_binary and class_weights.pos_weight is not None:
        raise ValueError("pos_weight is for binary cross-entropy (loss_type='bce'): use weight.")
    for name, given in class_weights._asdict().items():
        allowed = {(num_classes,)} if not is_binary else {(num_classes,), (1,), ()}
        if given is not None and tuple(given.shape) not in allowed:
            raise ValueError(f'{name} must have shape (c,) = ({num_classes},), got {tuple(given.shape)}.')
    return ClassWeights(*(given if given is None else given.expand(num_classes) for given in class_weights))


def check_weight_values(**weights: torch.Tensor | None) -> None:
    """Check that class weights are tensors of finite values that are not negative.

    Raises:
        TypeError: If weights are not a tensor.
        ValueError: If a value is negative, infinite or NaN. Values on a device other than the CPU are not checked.
    """
    for name, given in weights.items():
        if given is not None and not isinstance(given, torch.Tensor):
            raise TypeError(f'{name} must be a tensor (c,), got {type(given).__name__}.')
        # Negated, to reject NaN too.
        if given is not None and given.device.type == 'cpu' and not 0 <= given.min() <= given.max() < torch.inf:
            raise ValueError(f'{name} must be finite and not negative, got {given.tolist()}.')


def make_targets(
        target: torch.Tensor,
        num_classes: int,
        class_weights: ClassWeights,
        smoothing: float,
        teacher: torch.Tensor | None,
        is_binary: bool,
) -> Targets:
    """Return the targets of a loss. As in PyTorch, class weights normalize cross-entropy with class indices."""
    normalizer = None
    if class_weights.weight is not None and not is_binary and not target.is_floating_point():
        normalizer = class_weights.weight[target]
    return Targets(class_rows(target, num_classes, smoothing), normalizer, teacher, *class_weights)
