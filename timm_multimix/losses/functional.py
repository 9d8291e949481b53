"""Functional form of the MultiMix losses."""
from typing import Any

import torch

from .fused import FusedLoss, FusedLossFunction
from .targets import check_class_weights, check_target, check_target_values, make_targets
from .weights import is_eager_cpu

CHECKED_ELEMENTS = 2 ** 18  # number of weights that are validated at a time


def mean(total: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Return total / divisor, and 0 for no mixes, with a divisor of 0."""
    return total / divisor.clamp_min(torch.finfo(divisor.dtype).tiny)


def check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f'smoothing must be in [0, 1), got {smoothing}.')


def _check_weights(logits: torch.Tensor, weights: torch.Tensor) -> None:
    positions = logits.shape[1:-1]  # () or (r,)
    fits = logits.ndim in (2, 3) and weights.ndim == logits.ndim and 0 not in weights.shape and (
        (*weights.shape[:-2], weights.shape[-1]) == (*positions, logits.shape[0]))
    if not fits:
        raise ValueError(
            'Expected logits (b, c) with weights (n, b), or logits (b, r, c) with weights (r, n, b), '
            f'got logits {tuple(logits.shape)} and weights {tuple(weights.shape)}.')
    if is_eager_cpu(weights.device):
        for block in torch.split(weights.detach(), max(1, CHECKED_ELEMENTS // weights.shape[-1]), dim=-2):
            total = block.sum(dim=-1)
            # Negated, to reject NaN too.
            if not (block.min() >= -1e-6 and ((total - 1).abs() <= 1e-3).logical_or(total == 0).all()):
                raise ValueError('Rows of weights must be finite, non-negative and sum to 1. See sample_weights.')


def teacher_rows(logits: torch.Tensor, teacher_logits: torch.Tensor | None, weight: float) -> torch.Tensor | None:
    """Return the teacher's logits as (b, r, c), or (b, 1, c) for all positions, or None without a teacher."""
    if teacher_logits is None or weight == 0:
        return None
    if teacher_logits.ndim == 2:
        teacher_logits = teacher_logits.unsqueeze(1)
    batch_size, num_positions, num_classes = logits.shape
    if teacher_logits.shape not in ((batch_size, 1, num_classes), logits.shape):
        raise ValueError(
            f"The teacher's logits must have shape (b, c) = ({batch_size}, {num_classes}) or (b, r, c) = "
            f'({batch_size}, {num_positions}, {num_classes}), got {tuple(teacher_logits.shape)}. For a teacher with '
            'another number of positions, pass its ordinary logits (b, c).')
    return teacher_logits.detach()


def _mixed_loss(
        logits: torch.Tensor,
        target: torch.Tensor,
        weights: torch.Tensor,
        attention_grad: bool,
        smoothing: float,
        teacher_logits: torch.Tensor | None,
        class_weights: dict[str, torch.Tensor | None],
        **options: Any,
) -> torch.Tensor:
    _check_weights(logits, weights)
    loss = FusedLoss(num_mixes=weights.shape[-2], **options)
    batch_size, num_classes = logits.shape[0], logits.shape[-1]
    target = check_target(target, torch.Size((batch_size, num_classes)), loss.is_binary)
    check_target_values(target, num_classes)
    check_smoothing(smoothing)
    check_class_weights(**class_weights)
    if logits.ndim == 2:
        logits, weights = logits.unsqueeze(1), weights.unsqueeze(0)
    teacher = teacher_rows(logits, teacher_logits, loss.distill_weight)
    targets = make_targets(target, num_classes, smoothing, teacher, loss.is_binary, **class_weights)
    return mean(*FusedLossFunction.apply(logits, weights if attention_grad else weights.detach(), None, loss, *targets))


def multimix_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        weights: torch.Tensor,
        *,
        balance: bool = True,
        attention_grad: bool = False,
        smoothing: float = 0.0,
        logit_scale: float = 1.0,
        weight: torch.Tensor | None = None,
        teacher_logits: torch.Tensor | None = None,
        distill_weight: float = 0.25,
        distill_temperature: float = 1.0,
        tile_size: int | None = None,
) -> torch.Tensor:
    """Compute the cross-entropy of mixed logits with mixed targets, mean over mixes and positions (P2, eq. 14).

    The computation is in float32 (float64 for float64 logits), also under autocast. The mixed logits are computed in
    tiles. Memory grows with n only by the weights of the positions computed together: n·b numbers per position.
    Second derivatives are not supported.

    With a teacher, the loss is a convex combination of classification and distillation (P1, eq. 9). For a mix with
    logits l, targets y and teacher logits t, all mixed with the same weights, distill_weight w and temperature T it is

        (1 - w) H(y, softmax(l)) + w T² H(softmax(t / T), softmax(l / T))

    The factor T² keeps the magnitude of the gradient, as in timm's LogitDistillationTask.

    Args:
        logits: Logits (b, c), or logits at every position (b, r, c).
        target: Class indices (b,), int64, or soft targets (b, c).
        weights: Interpolation weights (n, b) or (r, n, b), rows on the simplex. See sample_weights and attend. Rows
            that are zero, as attend gives for padding, are left out of the mean.
        balance: Use the balanced gradient for the logits instead of the literal gradient (docs/method.md). The value
            of the loss is the same.
        attention_grad: Compute the gradient for the weights. It is not balanced.
        smoothing: Label smoothing of class indices. Soft targets are not smoothed.
        logit_scale: Factor on the mixed logits of model and teacher.
        weight: Class weights (c,), as in F.cross_entropy. They multiply the terms of the mixed targets. The sum over
            mixes is divided by the sum of the mixed class weights of the targets if targets are class indices, and by
            the number of mixes if they are soft. The terms of a teacher's predictions are multiplied by them too, and
            have the same divisor.
        teacher_logits: Logits of a teacher for the same examples, in the shape of logits, or (b, c) for all positions.
            They receive no gradient.
        distill_weight: Weight of the distillation term, in [0, 1]. It is ignored without a teacher.
        distill_temperature: Temperature that divides the logits of model and teacher in the distillation term.
        tile_size: Number of mixes in a tile. It does not change the result. By default a tile fits the cache of a CPU
            core.

    Returns:
        The loss, a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: If shapes do not match, a target is out of range, or rows of weights are not on the simplex. Values
            are checked on the CPU only, and not in compiled code.
    """
    return _mixed_loss(
        logits, target, weights, attention_grad, smoothing, teacher_logits, dict(weight=weight), is_binary=False,
        balance=balance, logit_scale=logit_scale, tile_size=tile_size, distill_weight=distill_weight,
        distill_temperature=distill_temperature)


def multimix_binary_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        weights: torch.Tensor,
        *,
        balance: bool = True,
        attention_grad: bool = False,
        smoothing: float = 0.0,
        sum_classes: bool = False,
        logit_scale: float = 1.0,
        weight: torch.Tensor | None = None,
        pos_weight: torch.Tensor | None = None,
        teacher_logits: torch.Tensor | None = None,
        distill_weight: float = 0.25,
        distill_temperature: float = 1.0,
        tile_size: int | None = None,
) -> torch.Tensor:
    """Compute the binary cross-entropy of mixed logits with mixed targets, for multi-label or timm's BCE training.

    See `multimix_cross_entropy` for the other arguments. Probabilities of the teacher are sigmoids too.

    Args:
        target: Multi-hot or soft targets (b, c), or class indices (b,) for single-label training.
        sum_classes: Sum over classes instead of the mean, as timm's BinaryCrossEntropy.
        weight: Class weights (c,). The mean is divided by the number of mixes and classes, as in
            F.binary_cross_entropy_with_logits.
        pos_weight: Weights of the positive terms (c,), as in F.binary_cross_entropy_with_logits.
    """
    loss = _mixed_loss(
        logits, target, weights, attention_grad, smoothing, teacher_logits, dict(weight=weight, pos_weight=pos_weight),
        is_binary=True, balance=balance, logit_scale=logit_scale, tile_size=tile_size, distill_weight=distill_weight,
        distill_temperature=distill_temperature)
    return loss if sum_classes else loss / logits.shape[-1]
