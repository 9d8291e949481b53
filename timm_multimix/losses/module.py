"""MultiMix as a loss module."""
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
# Values of None arguments of MultiMixLoss for each preset.
PRESETS = {
    'default': dict(alpha=None, balance=True, pooled_weight=0.5),
    'paper': dict(alpha=(0.5, 2.0), balance=False, pooled_weight=0.0),
}
AUTO_SCALE_REMOVED = (
    "'auto' was removed. Pass a number, or omit logit_scale and calibrate the trained model: --calibrate on the "
    'command line, calibrate() in Python.')


class MultiMixOutput(NamedTuple):
    """Output of an attached model in training mode.

    Attributes:
        logits: Ordinary logits of the model (b, c).
        dense_logits: Logits at every position (b, r, c), positions in row-major order, or None in pooled mode.
        attention: Attention of each example over its positions (b, r), or None for uniform attention.
    """
    logits: torch.Tensor
    dense_logits: torch.Tensor | None = None
    attention: torch.Tensor | None = None


def _as_output(output: MultiMixOutput | torch.Tensor, name: str = 'MultiMixLoss') -> MultiMixOutput:
    if isinstance(output, torch.Tensor):
        return MultiMixOutput(output)
    if not isinstance(output, MultiMixOutput):
        raise TypeError(
            f'{name} expects logits (b, c) or the MultiMixOutput of an attached model, got {type(output).__name__}: if '
            'the model returns several values, pass its logits.')
    return output


class MultiMixLoss(nn.Module):
    """MultiMix loss. It draws interpolation weights and mixes the logits and targets with them.

    The input is the output of an attached model in training mode, or the logits of any PyTorch classifier (pooled
    MultiMix). The loss is a convex combination:

        (1 - clean_weight) * ((1 - pooled_weight) * dense + pooled_weight * pooled) + clean_weight * plain loss

    The dense term mixes the logits at every position, the pooled term mixes the ordinary logits. Without dense logits,
    pooled_weight is 1. Memory grows with the number of mixes only by the weights of the positions computed together:
    n·b numbers per position.

    Args:
        num_mixes: Number of mixes n at every position. It should be well above the batch size.
        preset: Values of alpha, balance and pooled_weight if they are None. 'default': alpha = 1 / (examples in a mix),
            balance=True and pooled_weight=0.5 (see docs/method.md). 'paper': alpha=(0.5, 2.0), balance=False and
            pooled_weight=0, as in the papers, which use this loss for half of the batches (see the prob argument of
            MultiMixTask).
        alpha: Dirichlet concentration: a number, or a (low, high) pair from which each mix draws its concentration.
        tuple_length: Number of examples m in a mix, None for the whole mini-batch. It is limited to the batch size.
        shared_weights: Use the same weights at all positions, which is faster. By default weights are drawn for each
            position (P2, eq. 10). The attention of the positions still differs.
        attention: None uses the attention of the output, or uniform attention if it has none. 'cam' computes attention
            from the dense logits of the true class. 'uniform' ignores the attention of the output.
        attention_norm: Normalization of the 'cam' attention: 'relu' or 'softmax'.
        attention_grad: Backpropagate through the attention.
        balance: Use the balanced gradient. False is the literal gradient of the papers.
        pooled_weight: Weight of the pooled term relative to the dense term, in [0, 1]. The dense term does not train
            the class token of a model that predicts from it. Keep the weight above 0 for such a model, unless other
            batches train it.
        clean_weight: Weight of the plain loss on unmixed examples, in [0, 1].
        logit_scale: Factor on the mixed logits inside the loss. It multiplies the gradient too.
        smoothing: Label smoothing of class indices. Soft targets, such as the targets of timm's Mixup, are not
            smoothed.
        loss_type: 'ce' for softmax cross-entropy, 'bce' for binary cross-entropy, mean over classes.
        gather: Mix the joined batch of all processes of torch.distributed. The loss, and the gradient averaged by
            DistributedDataParallel or FSDP, are equal to the results of one process with all examples. The logits are
            exchanged once (docs/distributed.md). Every process draws the weights of its share of the positions, so
            generators should differ between processes. shared_weights applies within each share.
        generator: Random number generator, by default PyTorch's generator of the device of the logits.
        tile_size: Number of mixes whose mixed logits are in memory together. It does not change the result.

    Shapes:
        output: MultiMixOutput, or logits (b, c).
        target: class indices (b,), or soft or multi-hot targets (b, c). With 'bce', multi-hot targets can be integers.
        teacher: output of a teacher for the same examples, in the form of `output`, or None. See `terms`.
        Returns a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: If an option is out of range, or the shapes of the inputs do not match.
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
                f"attention must be 'cam', 'uniform' or None (attention of the output), got {attention!r}. Pass other "
                'queries to attach().')
        for name, weight in (('pooled_weight', pooled_weight), ('clean_weight', clean_weight)):
            if not 0 <= weight <= 1:
                raise ValueError(f'{name} must be in [0, 1], got {weight}.')
        if logit_scale == 'auto':
            raise ValueError(f"logit_scale='auto': {AUTO_SCALE_REMOVED}")
        if not (isinstance(logit_scale, (int, float)) and 0 < logit_scale < math.inf):
            raise ValueError(f'logit_scale must be a positive number, got {logit_scale!r}.')
        if loss_type not in LOSS_TYPES:
            raise ValueError(f'loss_type must be one of {", ".join(LOSS_TYPES)}, got {loss_type!r}.')
        check_attention(attention or 'uniform', attention_norm)
        check_smoothing(smoothing)
        self.num_mixes = num_mixes
        alpha_range(alpha, 1)  # validates alpha
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
        """Return the loss and its terms.

        Args:
            output: MultiMixOutput of an attached model, or logits (b, c).
            target: Class indices (b,), or soft or multi-hot targets (b, c).
            teacher: Output of a teacher for the same examples. Each term then combines classification and distillation.
                The logits of model and teacher are mixed with the same weights, attended with the attention of
                `output`. If the teacher has no dense logits, its ordinary logits are used at all positions.
            distill_weight: Weight of the distillation term, in [0, 1]. With 0 the teacher is ignored.
            distill_temperature: Temperature that divides the logits of model and teacher in the distillation term.

        Returns:
            'loss', and the terms 'dense', 'pooled' and 'clean' whose weight is above 0.

        Raises:
            ValueError: If an option is out of range, or the shapes of the inputs do not match.
        """
        distillation = check_distillation(distill_weight, distill_temperature)
        logits, dense_logits, attention = _as_output(output)
        teacher = MultiMixOutput(None) if teacher is None else _as_output(teacher, 'The teacher of MultiMixLoss')
        if logits.ndim != 2:
            raise ValueError(
                f'MultiMixLoss expects logits (b, c) or a MultiMixOutput, got logits of shape {tuple(logits.shape)}. '
                'For logits at every position (b, r, c) use multimix_cross_entropy.')
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
        """Return the number of examples in a mix. The last batch of an epoch can be smaller than tuple_length."""
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
                # There are more processes than positions. This process has no loss, but it must take part in the
                # collectives of the backward pass. The sum of empty tensors keeps them in a compiled graph.
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
