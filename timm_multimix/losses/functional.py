"""MultiMix losses as functions of logits, targets and weights, and the checks of their arguments."""
import torch

from .fused import Distillation, FusedLoss, FusedLossFunction, Partition, sigmoid_partition, softmax_partition

CHECKED_ELEMENTS = 2 ** 18  # of weights, at a time


def multi_hot(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integer or boolean multi-hot targets (b, c) in the dtype of the loss; others as they are."""
    return target if target.is_floating_point() or target.ndim != 2 else target.to(dtype)


def check_num_classes(num_classes: int, loss_type: str) -> None:
    if loss_type == 'ce' and num_classes == 1:
        raise ValueError(
            'The softmax cross-entropy of a single logit is always 0 and trains nothing: use binary cross-entropy '
            "(loss_type='bce') with targets (b, 1), or two classes.")


def class_rows(target: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Targets as rows (b, c). Smoothing applies to class indices; soft targets come smoothed, as in timm."""
    if target.is_floating_point():
        return target.detach()
    off_value = smoothing / num_classes
    rows = torch.full((len(target), num_classes), off_value, device=target.device)
    return rows.scatter_(1, target.unsqueeze(1), 1 - smoothing + off_value)


def loss_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _may_look(tensor: torch.Tensor) -> bool:
    """Whether looking at values is free: it would synchronise a GPU, and break a compiled graph."""
    return tensor.device.type == 'cpu' and not torch.compiler.is_compiling()


def check_target(logits: torch.Tensor, target: torch.Tensor) -> None:
    batch_size, num_classes = logits.shape[0], logits.shape[-1]
    if not batch_size:
        raise ValueError('The batch is empty: there is nothing to mix.')
    if target.is_floating_point():
        if target.shape != (batch_size, num_classes):
            raise ValueError(
                f'Soft targets must have shape (b, c) = ({batch_size}, {num_classes}), got {tuple(target.shape)}.')
        if _may_look(target) and not target.min() >= 0:  # negated, so that NaN is caught too
            raise ValueError(f'Soft targets must not be negative, got {target.min().item()}.')
        return
    if target.dtype != torch.int64 or target.shape != (batch_size,):
        raise ValueError(
            f'Class indices must be int64 with shape (b,) = ({batch_size},), got {target.dtype} with shape '
            f'{tuple(target.shape)}. Soft targets must be floating point with shape (b, c).')
    if _may_look(target) and not 0 <= target.min() <= target.max() < num_classes:
        raise ValueError(
            f'Class indices must lie in [0, {num_classes - 1}] for {num_classes} classes, '
            f'got values from {target.min().item()} to {target.max().item()}.')


def check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f'smoothing must lie in [0, 1), got {smoothing}.')


def _check_weights(logits: torch.Tensor, weights: torch.Tensor) -> None:
    positions = logits.shape[1:-1]  # () or (r,)
    fits = logits.ndim in (2, 3) and weights.ndim == logits.ndim and 0 not in weights.shape and (
        (*weights.shape[:-2], weights.shape[-1]) == (*positions, logits.shape[0]))
    if not fits:
        raise ValueError(
            'Takes logits (b, c) with weights (n, b), or logits (b, r, c) with weights (r, n, b), '
            f'got logits {tuple(logits.shape)} and weights {tuple(weights.shape)}.')
    if _may_look(weights):
        for block in weights.detach().split(max(1, CHECKED_ELEMENTS // weights.shape[-1]), dim=-2):
            # Negated, so that NaN is caught too.
            if not (block.min() >= -1e-6 and (block.sum(dim=-1) - 1).abs().max() <= 1e-3):
                raise ValueError('Rows of weights must be finite, non-negative and sum to 1. See sample_weights.')


def check_attention_map(dense_logits: torch.Tensor, attention: torch.Tensor) -> None:
    if attention.shape != dense_logits.shape[:2]:
        raise ValueError(
            f'attention must have shape (b, r) = {tuple(dense_logits.shape[:2])}, got {tuple(attention.shape)}.')
    # Negated, so that NaN is caught too; but not where the model is at fault: its loss is not finite then, as any loss.
    is_wrong = _may_look(attention) and not 0 <= attention.detach().min() <= attention.detach().max() < torch.inf
    if is_wrong and dense_logits.detach().isfinite().all():
        raise ValueError('attention must be non-negative and finite. See attention_map.')


def check_distillation(distill_weight: float, distill_temperature: float) -> Distillation:
    """Return the share and the temperature of a distillation term.

    Raises:
        ValueError: if one is out of range.
    """
    if not 0 <= distill_weight <= 1:
        raise ValueError(f'distill_weight is a share and must lie in [0, 1], got {distill_weight}.')
    if not 0 < distill_temperature < torch.inf:
        raise ValueError(f'distill_temperature must be positive, got {distill_temperature}.')
    return Distillation(distill_weight, distill_temperature)


def teacher_rows(logits: torch.Tensor, teacher_logits: torch.Tensor | None, weight: float) -> torch.Tensor | None:
    """The teacher's logits as (b, r, c), or (b, 1, c) for all positions of logits (b, r, c); None without a teacher."""
    if teacher_logits is None or weight == 0:
        return None
    if teacher_logits.ndim == 2:
        teacher_logits = teacher_logits.unsqueeze(1)
    batch_size, num_positions, num_classes = logits.shape
    if teacher_logits.shape not in ((batch_size, 1, num_classes), logits.shape):
        raise ValueError(
            f"The teacher's logits must have shape (b, c) = ({batch_size}, {num_classes}), or (b, r, c) = "
            f'({batch_size}, {num_positions}, {num_classes}), to teach these, got {tuple(teacher_logits.shape)}. '
            'A teacher of another resolution can teach with its ordinary logits (b, c).')
    return teacher_logits.detach()


def _mixed_loss(
        partition: Partition,
        logits: torch.Tensor,
        target: torch.Tensor,
        weights: torch.Tensor,
        attention_grad: bool,
        smoothing: float,
        teacher_logits: torch.Tensor | None,
        distillation: Distillation,
        **options,
) -> torch.Tensor:
    _check_weights(logits, weights)
    if partition is sigmoid_partition:
        target = multi_hot(target, loss_dtype(logits))
    check_target(logits, target)
    check_smoothing(smoothing)
    if logits.ndim == 2:
        logits, weights = logits.unsqueeze(1), weights.unsqueeze(0)
    return FusedLossFunction.apply(
        logits,
        weights if attention_grad else weights.detach(),
        None,
        class_rows(target, logits.shape[-1], smoothing),
        teacher_rows(logits, teacher_logits, distillation.weight),
        FusedLoss(partition, weights.shape[1], distillation=distillation, **options),
    )


def multimix_cross_entropy(
        logits: torch.Tensor,
        target: torch.Tensor,
        weights: torch.Tensor,
        *,
        balance: bool = True,
        attention_grad: bool = False,
        smoothing: float = 0.0,
        logit_scale: float = 1.0,
        teacher_logits: torch.Tensor | None = None,
        distill_weight: float = 0.25,
        distill_temperature: float = 1.0,
        tile_size: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of mixed logits with mixed targets, mean over mixes and positions (P2, sec. 3.2 and eq. 14).

    Works in float32 (float64 for float64 logits), under autocast too. Beyond the arguments, memory grows with n only by
    the weights of the positions that are computed together, n·b numbers for at least one position. Differentiable once.

    With a teacher it is the convex combination of that and of distillation (P1, eq. 9): for a mix with logits l,
    targets y and teacher's logits t, all mixed with the same weights, share w and temperature T,

        (1 - w) H(y, softmax(l)) + w T² H(softmax(t / T), softmax(l / T))

    where T² keeps the gradient's size, as in timm's LogitDistillationTask.

    Args:
        logits: Logits (b, c), or at every position (b, r, c).
        target: Class indices (b,), int64, or soft targets (b, c).
        weights: Interpolation weights (n, b), or (r, n, b); rows on the simplex. See sample_weights and attend.
        balance: Return the balanced gradient for the logits, not the literal one (docs/method.md). The value of the
            loss is the same.
        attention_grad: Let gradient through the weights. Exact; not affected by balance.
        smoothing: Label smoothing of class indices. Soft targets are taken as they are.
        logit_scale: Factor on the mixed logits, a teacher's too.
        teacher_logits: A teacher's logits for the same examples, of the shape of logits, or (b, c) to teach all
            positions alike; no gradient reaches them. None without a teacher.
        distill_weight: Share of the distillation term if there is a teacher, in [0, 1].
        distill_temperature: Divides both sides' logits in that term.
        tile_size: Number of mixes whose mixed logits are in memory together. By default they fit the cache of a CPU's
            core. It does not change the result.

    Returns:
        The loss, a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: if shapes do not fit, a target is out of range, or weights are off the simplex (values are looked at
            on CPU only, where that needs no synchronisation, and not in compiled code).
    """
    return _mixed_loss(
        softmax_partition, logits, target, weights, attention_grad, smoothing, teacher_logits,
        check_distillation(distill_weight, distill_temperature),
        balance=balance, logit_scale=logit_scale, tile_size=tile_size)


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
        teacher_logits: torch.Tensor | None = None,
        distill_weight: float = 0.25,
        distill_temperature: float = 1.0,
        tile_size: int | None = None,
) -> torch.Tensor:
    """Binary cross-entropy of mixed logits with mixed targets, for multi-label targets and timm's BCE training.

    The twin of `multimix_cross_entropy`, with the same arguments (a teacher's probabilities are sigmoids too), except:

    Args:
        target: Multi-hot or soft targets (b, c), or class indices (b,) for BCE training on single labels.
        sum_classes: Sum over classes instead of taking their mean, as timm's BinaryCrossEntropy does.
    """
    loss = _mixed_loss(
        sigmoid_partition, logits, target, weights, attention_grad, smoothing, teacher_logits,
        check_distillation(distill_weight, distill_temperature),
        balance=balance, logit_scale=logit_scale, tile_size=tile_size)
    return loss if sum_classes else loss / logits.shape[-1]
