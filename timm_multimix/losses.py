"""MultiMix losses: functions on logits, targets and weights, and the module that draws its own weights."""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .attention import attention_map, check_attention
from .distributed import check_same_sizes, gather_batch, mean_over_processes, num_processes, share_positions
from .fused import Distillation, FusedLoss, FusedLossFunction, Partition, sigmoid_partition, softmax_partition
from .weights import Alpha, alpha_range, sample_weights

LOSS_TYPES = ('ce', 'bce')
# Arguments of MultiMixLoss that a preset sets.
PRESETS = {
    'default': dict(alpha=None, balance=True, pooled_weight=0.5),
    'paper': dict(alpha=(0.5, 2.0), balance=False, pooled_weight=0.0),
}
AUTO_SCALE_REMOVED = (
    "'auto' was removed. Give a number, or leave logit_scale out and calibrate the trained model: --calibrate on the "
    'command line, calibrate() in Python.')
CHECKED_ELEMENTS = 2 ** 18  # of weights, at a time


class MultiMixOutput(NamedTuple):
    """The output of an attached model while it trains.

    Attributes:
        logits: The model's ordinary prediction (b, c), for `output.logits.argmax(1)`.
        dense_logits: Logits at every position (b, r, c), positions in row-major order; None in pooled mode.
        attention: Attention of each example over its positions (b, r); None stands for uniform.
    """
    logits: torch.Tensor
    dense_logits: torch.Tensor | None = None
    attention: torch.Tensor | None = None


def _as_output(output: MultiMixOutput | torch.Tensor, name: str = 'MultiMixLoss') -> MultiMixOutput:
    if isinstance(output, torch.Tensor):
        return MultiMixOutput(output)
    if not isinstance(output, MultiMixOutput):
        raise TypeError(
            f'{name} takes logits (b, c) or the MultiMixOutput of an attached model, got {type(output).__name__}: if '
            'the model returns several values, pass its logits.')
    return output


def _multi_hot(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integer or boolean multi-hot targets (b, c) in the dtype of the loss; others as they are."""
    return target if target.is_floating_point() or target.ndim != 2 else target.to(dtype)


def _check_num_classes(num_classes: int, loss_type: str) -> None:
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


def _loss_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _may_look(tensor: torch.Tensor) -> bool:
    """Whether looking at values is free: it would synchronise a GPU, and break a compiled graph."""
    return tensor.device.type == 'cpu' and not torch.compiler.is_compiling()


def _check_target(logits: torch.Tensor, target: torch.Tensor) -> None:
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


def _check_smoothing(smoothing: float) -> None:
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


def _check_attention_map(dense_logits: torch.Tensor, attention: torch.Tensor) -> None:
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


def _teacher_rows(logits: torch.Tensor, teacher_logits: torch.Tensor | None, weight: float) -> torch.Tensor | None:
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
        target = _multi_hot(target, _loss_dtype(logits))
    _check_target(logits, target)
    _check_smoothing(smoothing)
    if logits.ndim == 2:
        logits, weights = logits.unsqueeze(1), weights.unsqueeze(0)
    return FusedLossFunction.apply(
        logits,
        weights if attention_grad else weights.detach(),
        None,
        class_rows(target, logits.shape[-1], smoothing),
        _teacher_rows(logits, teacher_logits, distillation.weight),
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


class MultiMixLoss(nn.Module):
    """MultiMix as a training loss. It draws the weights and mixes the logits with them.

    Takes what an attached model returns while training, or the plain logits of any PyTorch classifier (which makes it
    pooled MultiMix). The loss is a convex combination:

        (1 - clean_weight) * ((1 - pooled_weight) * dense + pooled_weight * pooled) + clean_weight * plain loss

    where the dense term mixes the logits at every position and the pooled term the model's ordinary logits; without
    dense logits the pooled term has all the weight. Memory grows with the number of mixes only by the weights of the
    positions that are computed together, n·b numbers for at least one position.

    Args:
        num_mixes: Number n of mixes, at every position. Keep it well above the batch size.
        preset: Values for alpha, balance and pooled_weight where they are None. 'default' is alpha = 1 / (examples in a
            mix), so that mixes are as varied in any batch (docs/method.md), balance=True and pooled_weight=0.5. 'paper'
            is what the papers' experiments use: alpha=(0.5, 2.0), balance=False and pooled_weight=0. They apply that
            loss to half of the batches only: see the prob argument of MultiMixTask.
        alpha: Dirichlet concentration: a number, or a (low, high) pair from which each mix draws its own. None takes
            the preset's.
        tuple_length: Number of examples m in a mix, None for the whole mini-batch. In a batch of fewer examples, such
            as the last one of an epoch, it is the size of the batch.
        shared_weights: Draw one set of weights for all positions, which saves time; the papers draw one for each
            (P2, eq. 10). Positions still differ by their attention.
        attention: None takes the attention that comes with the output, uniform if none does. 'cam' computes it here,
            from the dense logits of the true class, which only the loss knows; 'uniform' ignores what comes.
        attention_norm: 'relu' or 'softmax', for attention computed here.
        attention_grad: Let gradient through the attention.
        balance: Balanced gradient; False gives the literal gradient of the papers. None takes the preset's.
        pooled_weight: Share of the pooled term beside the dense one, in [0, 1]; None takes the preset's. A model that
            predicts from a class token trains that path through the pooled term only: do not set 0 there, unless other
            batches train it.
        clean_weight: Share of the plain loss on unmixed examples, in [0, 1].
        logit_scale: Factor on mixed logits inside the loss. It multiplies the gradient too.
        smoothing: Label smoothing of class indices. Soft targets, such as those of timm's Mixup, are taken as they are.
        loss_type: 'ce' for softmax cross-entropy; 'bce' for binary cross-entropy, mean over classes.
        gather: Mix the joined batch of all processes of torch.distributed instead of every process its own. Loss and,
            after DistributedDataParallel or FSDP have averaged it, gradient are those of one process with all the
            examples, at the cost of sending the logits once to where they are mixed (docs/distributed.md). Every
            process draws weights for its share of the positions, so their generators should differ, and weights are
            shared by those positions only.
        generator: Source of randomness, by default PyTorch's own for the device of the logits.
        tile_size: Number of mixes whose mixed logits are in memory together. It does not change the result.

    Shapes:
        output: a MultiMixOutput, or logits (b, c).
        target: class indices (b,), or soft or multi-hot targets (b, c). With 'bce', multi-hot targets may be integers.
        teacher: the output of a teacher for the same examples, as `output`, or None. See `terms`.
        Returns a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: for options out of range, and for inputs whose shapes do not fit.
    """

    def __init__(
            self,
            num_mixes: int = 1000,
            *,
            preset: str = 'default',
            alpha: Alpha | None = None,
            tuple_length: int | None = None,
            shared_weights: bool = False,
            attention: str | None = None,
            attention_norm: str = 'relu',
            attention_grad: bool = False,
            balance: bool | None = None,
            pooled_weight: float | None = None,
            clean_weight: float = 0.0,
            logit_scale: float = 1.0,
            smoothing: float = 0.0,
            loss_type: str = 'ce',
            gather: bool = False,
            generator: torch.Generator | None = None,
            tile_size: int | None = None,
    ):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f'preset must be one of {", ".join(PRESETS)}, got {preset!r}.')
        given = dict(alpha=alpha, balance=balance, pooled_weight=pooled_weight)
        alpha, balance, pooled_weight = (
            PRESETS[preset][name] if value is None else value for name, value in given.items())
        if num_mixes < 1:
            raise ValueError(f'num_mixes must be at least 1, got {num_mixes}.')
        if tuple_length is not None and tuple_length < 1:
            raise ValueError(f'tuple_length must be at least 1, or None for the whole batch, got {tuple_length}.')
        if attention not in (None, 'uniform', 'cam'):
            raise ValueError(
                f"attention must be 'cam', 'uniform' or None (what comes with the output), got {attention!r}. Other "
                'queries read the features: pass them to attach().')
        for name, weight in (('pooled_weight', pooled_weight), ('clean_weight', clean_weight)):
            if not 0 <= weight <= 1:
                raise ValueError(f'{name} is a share and must lie in [0, 1], got {weight}.')
        if logit_scale == 'auto':
            raise ValueError(f"logit_scale='auto': {AUTO_SCALE_REMOVED}")
        if not (isinstance(logit_scale, (int, float)) and 0 < logit_scale < math.inf):
            raise ValueError(f'logit_scale must be a positive number, got {logit_scale!r}.')
        if loss_type not in LOSS_TYPES:
            raise ValueError(f'loss_type must be one of {", ".join(LOSS_TYPES)}, got {loss_type!r}.')
        check_attention(attention or 'uniform', attention_norm)
        _check_smoothing(smoothing)
        self.num_mixes = num_mixes
        alpha_range(alpha, 1)  # refuses what is none, before the first batch
        self.alpha = alpha
        self.tuple_length = tuple_length
        self.shared_weights = shared_weights
        self.attention = attention
        self.attention_norm = attention_norm
        self.attention_grad = attention_grad
        self.balance = balance
        self.pooled_weight = pooled_weight
        self.clean_weight = clean_weight
        self.logit_scale = logit_scale
        self.smoothing = smoothing
        self.loss_type = loss_type
        self.gather = gather
        self.generator = generator
        self.tile_size = tile_size

    def extra_repr(self) -> str:
        return (
            f'num_mixes={self.num_mixes}, alpha={self.alpha}, tuple_length={self.tuple_length}, '
            f'balance={self.balance}, pooled_weight={self.pooled_weight}, clean_weight={self.clean_weight}, '
            f'logit_scale={self.logit_scale}')

    def forward(
            self,
            output: MultiMixOutput | torch.Tensor,
            target: torch.Tensor,
            teacher: MultiMixOutput | torch.Tensor | None = None,
            *,
            distill_weight: float = 0.25,
            distill_temperature: float = 1.0,
    ) -> torch.Tensor:
        terms = self.terms(
            output, target, teacher, distill_weight=distill_weight, distill_temperature=distill_temperature)
        return terms['loss']

    def terms(
            self,
            output: MultiMixOutput | torch.Tensor,
            target: torch.Tensor,
            teacher: MultiMixOutput | torch.Tensor | None = None,
            *,
            distill_weight: float = 0.25,
            distill_temperature: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """The loss and what it is made of.

        Args:
            output: What an attached model returned, or logits (b, c).
            target: Class indices (b,), or soft or multi-hot targets (b, c).
            teacher: What a teacher returned for the same examples. Each term then combines classification and
                distillation, both with the same weights, attended with the attention of `output`: what a mix shows, its
                target and its teacher belong together. A teacher without dense logits teaches all positions alike.
            distill_weight: Share of the distillation term, in [0, 1]; 0 is the loss without a teacher.
            distill_temperature: Divides both sides' logits in that term.

        Returns:
            'loss', and those of 'dense', 'pooled', 'clean' that have weight.

        Raises:
            ValueError: for inputs whose shapes do not fit.
        """
        distillation = check_distillation(distill_weight, distill_temperature)
        logits, dense_logits, attention = _as_output(output)
        teacher = MultiMixOutput(None) if teacher is None else _as_output(teacher, 'The teacher of MultiMixLoss')
        if logits.ndim != 2:
            raise ValueError(
                f'MultiMixLoss takes logits (b, c) or a MultiMixOutput, got logits of shape {tuple(logits.shape)}. For '
                'logits at every position (b, r, c), without a model that is attached, use multimix_cross_entropy.')
        _check_num_classes(logits.shape[1], self.loss_type)
        if self.loss_type == 'bce':
            target = _multi_hot(target, _loss_dtype(logits))
        _check_target(logits, target)
        mixed_target = target
        if self.gather:
            num_positions = 0 if dense_logits is None else dense_logits.shape[1]
            check_same_sizes((len(logits), num_positions, logits.shape[1]), logits.device)
            mixed_target, = gather_batch(target)
        pooled_weight = 1.0 if dense_logits is None else self.pooled_weight
        shares = {
            'dense': (1 - self.clean_weight) * (1 - pooled_weight),
            'pooled': (1 - self.clean_weight) * pooled_weight,
            'clean': self.clean_weight,
        }
        terms = {}
        if shares['dense']:
            attention = self._attention(dense_logits, attention, target)
            dense_teacher = teacher.logits if teacher.dense_logits is None else teacher.dense_logits
            terms['dense'] = self._mixed(dense_logits, mixed_target, attention, dense_teacher, distillation)
        if shares['pooled']:
            terms['pooled'] = self._mixed(logits.unsqueeze(1), mixed_target, None, teacher.logits, distillation)
        if shares['clean']:
            terms['clean'] = self._clean(logits, target, teacher.logits, distillation)
        if self.gather:
            terms = dict(zip(terms, mean_over_processes(torch.stack(list(terms.values()))).unbind(), strict=True))
        loss = sum(shares[name] * term for name, term in terms.items())
        return {'loss': loss, **terms}

    def _attention(
            self,
            dense_logits: torch.Tensor,
            attention: torch.Tensor | None,
            target: torch.Tensor,
    ) -> torch.Tensor | None:
        if self.attention == 'cam':
            attention = attention_map(None, dense_logits, target, query='cam', norm=self.attention_norm)
        elif self.attention == 'uniform':
            attention = None
        if attention is None:
            return None
        _check_attention_map(dense_logits, attention)
        return attention if self.attention_grad else attention.detach()

    def _tuple_length(self, batch_size: int) -> int:
        """Examples in a mix: not more than there are in this batch, which may be the last and smaller one."""
        return batch_size if self.tuple_length is None else min(self.tuple_length, batch_size)

    def _mixed(
            self,
            logits: torch.Tensor,
            target: torch.Tensor,
            attention: torch.Tensor | None,
            teacher: torch.Tensor | None,
            distillation: Distillation,
    ) -> torch.Tensor:
        teacher = _teacher_rows(logits, teacher, distillation.weight)
        share = 1.0
        if self.gather:
            num_positions = logits.shape[1]
            teacher = teacher.expand_as(logits) if teacher is not None else None
            logits, attention, teacher = share_positions(logits, attention, teacher)
            share = num_processes() * logits.shape[1] / num_positions
            if not share:
                # More processes than positions: nothing to do but take part in the exchange, forward and backward. A
                # compiler would drop what has no use.
                received = (tensor for tensor in (logits, attention, teacher, target) if tensor is not None)
                return sum(tensor[:0].sum(dtype=_loss_dtype(logits)) for tensor in received)
        batch_size, _, num_classes = logits.shape
        sample = partial(
            sample_weights,
            self.num_mixes,
            batch_size,
            alpha=self.alpha,
            tuple_length=self._tuple_length(batch_size),
            generator=self.generator,
            device=logits.device,
        )
        loss = FusedLossFunction.apply(
            logits,
            sample() if self.shared_weights else sample,
            attention,
            class_rows(target, num_classes, self.smoothing),
            teacher,
            FusedLoss(
                softmax_partition if self.loss_type == 'ce' else sigmoid_partition,
                self.num_mixes,
                self.balance,
                self.logit_scale,
                self.tile_size,
                distillation,
            ),
        )
        return share * (loss if self.loss_type == 'ce' else loss / num_classes)

    def _clean(
            self,
            logits: torch.Tensor,
            target: torch.Tensor,
            teacher: torch.Tensor | None,
            distillation: Distillation,
    ) -> torch.Tensor:
        logits = logits.to(_loss_dtype(logits))
        target = class_rows(target, logits.shape[1], self.smoothing).to(logits.dtype)
        if teacher is not None and distillation.weight:
            function = multimix_cross_entropy if self.loss_type == 'ce' else multimix_binary_cross_entropy
            return function(
                logits, target, torch.eye(len(logits), device=logits.device), teacher_logits=teacher,
                distill_weight=distillation.weight, distill_temperature=distillation.temperature)
        if self.loss_type == 'ce':
            return F.cross_entropy(logits, target)
        return F.binary_cross_entropy_with_logits(logits, target)
