"""MultiMixLoss: MultiMix as a training loss that draws its own weights."""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .attention import attention_map, check_attention
from .functional import (
    check_attention_map,
    check_distillation,
    check_num_classes,
    check_smoothing,
    check_target,
    class_rows,
    loss_dtype,
    multi_hot,
    multimix_binary_cross_entropy,
    multimix_cross_entropy,
    teacher_rows,
)
from .fused import Distillation, FusedLoss, FusedLossFunction, sigmoid_partition, softmax_partition
from .gather import check_same_sizes, gather_batch, mean_over_processes, num_processes, share_positions
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
        check_smoothing(smoothing)
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
        check_num_classes(logits.shape[1], self.loss_type)
        if self.loss_type == 'bce':
            target = multi_hot(target, loss_dtype(logits))
        check_target(logits, target)
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
        check_attention_map(dense_logits, attention)
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
        teacher = teacher_rows(logits, teacher, distillation.weight)
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
                return sum(tensor[:0].sum(dtype=loss_dtype(logits)) for tensor in received)
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
        logits = logits.to(loss_dtype(logits))
        target = class_rows(target, logits.shape[1], self.smoothing).to(logits.dtype)
        if teacher is not None and distillation.weight:
            function = multimix_cross_entropy if self.loss_type == 'ce' else multimix_binary_cross_entropy
            return function(
                logits, target, torch.eye(len(logits), device=logits.device), teacher_logits=teacher,
                distill_weight=distillation.weight, distill_temperature=distillation.temperature)
        if self.loss_type == 'ce':
            return F.cross_entropy(logits, target)
        return F.binary_cross_entropy_with_logits(logits, target)
