"""MultiMix as a loss module."""
import math
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .attention import attention_map, check_attention
from .functional import (
    check_attention_map,
    check_dense_target,
    check_distillation,
    check_num_classes,
    check_output,
    check_smoothing,
    check_target,
    mean,
    teacher_rows,
)
from .fused import Distillation, FusedLoss, FusedLossFunction, sigmoid_partition, softmax_partition
from .gather import check_same_sizes, gather_batch, mean_over_processes, share_positions
from .output import MultiMixOutput, as_output
from .targets import (
    ClassWeights,
    Targets,
    check_class_weights,
    check_weight_values,
    loss_dtype,
    make_targets,
    multi_hot,
)
from .weights import Alpha, alpha_range, check_mask, sample_weights

PARTITIONS = {'ce': softmax_partition, 'bce': sigmoid_partition}
# Values of None arguments of MultiMixLoss for each preset.
PRESETS: dict[str, dict[str, Any]] = {
    'default': dict(alpha=None, balance=True, pooled_weight=0.5),
    'paper': dict(alpha=(0.5, 2.0), balance=False, pooled_weight=0.0),
}
AUTO_SCALE_REMOVED = (
    "'auto' was removed. Pass a number, or omit logit_scale and calibrate the trained model: --calibrate on the "
    'command line, calibrate() in Python.')


class MultiMixLoss(nn.Module):
    """MultiMix loss. It draws interpolation weights and mixes the logits and targets with them.

    The input is the output of an attached model in training mode, or the logits of any PyTorch classifier (pooled
    MultiMix). The loss is a convex combination:

        (1 - clean_weight) * ((1 - pooled_weight) * dense + pooled_weight * pooled) + clean_weight * plain loss

    The dense term mixes the logits at every position, the pooled term mixes the ordinary logits. Without dense logits,
    pooled_weight is 1. A mix whose examples all have attention 0 at a position, such as padding, is left out of the
    dense term, which is the mean over the other mixes and positions. Memory grows with the number of mixes only by the
    weights of the positions computed together: n·b numbers per position.

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
            from the dense logits of the true class. 'uniform' is uniform attention. Both ignore the attention of the
            output, also at padding, so sequences with padding need a mask.
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
        weight: Class weights (c,), as in F.cross_entropy. They multiply the terms of the mixed targets. The sum over
            mixes is divided by the sum of the mixed class weights of the targets if targets are class indices, and by
            the number of mixes if they are soft or with 'bce'. The terms of a teacher's predictions are multiplied by
            them too, and have the same divisor.
        pos_weight: Weights of the positive terms (c,) for 'bce', as in F.binary_cross_entropy_with_logits.
        ignore_index: Class index of positions without a target in `dense_target`. They have the effect of padding.
        gather: Mix the joined batch of all processes of torch.distributed. The loss, and the gradient averaged by
            DistributedDataParallel or FSDP, are equal to the results of one process with all examples. The logits are
            exchanged once (docs/distributed.md). Every process draws the weights of its share of the positions, so
            generators should differ between processes. shared_weights applies within each share.
        generator: Random number generator, by default PyTorch's generator of the device of the logits.
        tile_size: Number of mixes whose mixed logits are in memory together. It does not change the result.

    Shapes:
        output: MultiMixOutput, or logits (b, c).
        target: class indices (b,), or soft or multi-hot targets (b, c). With 'bce', multi-hot targets can be integers.
        mask: valid positions (b, r), True for valid, or None. See `terms`.
        dense_target: class indices (b, r), or soft or multi-hot targets (b, r, c), or None. See `terms`.
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
            weight: torch.Tensor | None = None,
            pos_weight: torch.Tensor | None = None,
            ignore_index: int = -100,
            gather: bool = False,
            generator: torch.Generator | None = None,
            tile_size: int | None = None,
    ):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f'preset must be one of {", ".join(PRESETS)}, got {preset!r}.')
        given: dict[str, Any] = dict(alpha=alpha, balance=balance, pooled_weight=pooled_weight)
        alpha, balance, share_of_pooled = (
            PRESETS[preset][name] if value is None else value for name, value in given.items())
        self.num_mixes = num_mixes
        self.alpha = alpha
        self.tuple_length = tuple_length
        self.shared_weights = shared_weights
        self.attention = attention
        self.attention_norm = attention_norm
        self.attention_grad = attention_grad
        self.balance = bool(balance)
        self.pooled_weight = share_of_pooled
        self.clean_weight = clean_weight
        self.logit_scale = logit_scale
        self.smoothing = smoothing
        self.loss_type = loss_type
        check_weight_values(weight=weight, pos_weight=pos_weight)
        self.register_buffer('weight', weight)
        self.register_buffer('pos_weight', pos_weight)
        self.ignore_index = ignore_index
        self.gather = gather
        self.generator = generator
        self.tile_size = tile_size
        self._check_options()

    def _check_options(self) -> None:
        if self.num_mixes < 1:
            raise ValueError(f'num_mixes must be at least 1, got {self.num_mixes}.')
        if self.tuple_length is not None and self.tuple_length < 1:
            raise ValueError(f'tuple_length must be at least 1, or None for the whole batch, got {self.tuple_length}.')
        if self.attention not in (None, 'uniform', 'cam'):
            raise ValueError(
                f"attention must be 'cam', 'uniform' or None (attention of the output), got {self.attention!r}. Pass "
                'other queries to attach().')
        for name, share in (('pooled_weight', self.pooled_weight), ('clean_weight', self.clean_weight)):
            if not 0 <= share <= 1:
                raise ValueError(f'{name} must be in [0, 1], got {share}.')
        if isinstance(self.logit_scale, str) and self.logit_scale == 'auto':
            raise ValueError(f"logit_scale='auto': {AUTO_SCALE_REMOVED}")
        if not (isinstance(self.logit_scale, (int, float)) and 0 < self.logit_scale < math.inf):
            raise ValueError(f'logit_scale must be a positive number, got {self.logit_scale!r}.')
        if self.loss_type not in PARTITIONS:
            raise ValueError(f'loss_type must be one of {", ".join(PARTITIONS)}, got {self.loss_type!r}.')
        check_attention(self.attention or 'uniform', self.attention_norm)
        check_smoothing(self.smoothing)
        alpha_range(self.alpha, 1)  # checks alpha

    def extra_repr(self) -> str:
        return (
            f'num_mixes={self.num_mixes}, alpha={self.alpha}, tuple_length={self.tuple_length}, '
            f'balance={self.balance}, pooled_weight={self.pooled_weight}, clean_weight={self.clean_weight}, '
            f'logit_scale={self.logit_scale}')

    def forward(
            self,
            output: MultiMixOutput | torch.Tensor,
            target: torch.Tensor | None = None,
            teacher: MultiMixOutput | torch.Tensor | None = None,
            *,
            mask: torch.Tensor | None = None,
            dense_target: torch.Tensor | None = None,
            distill_weight: float = 0.25,
            distill_temperature: float = 1.0,
    ) -> torch.Tensor:
        """Return the loss. See `terms` for the arguments."""
        terms = self.terms(
            output, target, teacher, mask=mask, dense_target=dense_target, distill_weight=distill_weight,
            distill_temperature=distill_temperature)
        return terms['loss']

    def terms(
            self,
            output: MultiMixOutput | torch.Tensor,
            target: torch.Tensor | None = None,
            teacher: MultiMixOutput | torch.Tensor | None = None,
            *,
            mask: torch.Tensor | None = None,
            dense_target: torch.Tensor | None = None,
            distill_weight: float = 0.25,
            distill_temperature: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """Return the loss and its terms.

        Args:
            output: MultiMixOutput of an attached model, or logits (b, c).
            target: Class indices (b,), or soft or multi-hot targets (b, c). None with `dense_target` computes the dense
                term only.
            teacher: Output of a teacher for the same examples. Each term then combines classification and distillation.
                The logits of model and teacher are mixed with the same weights, attended with the attention of
                `output`. If the teacher has no dense logits, its ordinary logits are used at all positions.
            mask: Valid positions (b, r) of the dense logits, True for valid. The attention of padding is set to 0. The
                loss does not depend on values at padding.
            dense_target: Targets of the dense term for each position: class indices (b, r), or soft or multi-hot
                targets (b, r, c). By default every position has the target of its example.
            distill_weight: Weight of the distillation term, in [0, 1]. With 0 the teacher is ignored.
            distill_temperature: Temperature that divides the logits of model and teacher in the distillation term.

        Returns:
            'loss', and the terms 'dense', 'pooled' and 'clean' whose weight is above 0. A term without mixes is 0.

        Raises:
            ValueError: If an option is out of range, or the shapes of the inputs do not match.
        """
        distillation = check_distillation(distill_weight, distill_temperature)
        tensors: Any = as_output(output)  # check_output and the shares of the terms determine which are not None
        logits, dense_logits, attention = tensors
        teacher = MultiMixOutput(None) if teacher is None else as_output(teacher, 'The teacher of MultiMixLoss')
        target, mask, dense_target = self._check_inputs(logits, dense_logits, target, mask, dense_target)
        mixed_target: Any = target
        if self.gather:
            like = dense_logits if logits is None else logits
            num_positions = 0 if dense_logits is None else dense_logits.shape[1]
            check_same_sizes((len(like), num_positions, like.shape[-1]), like.device)
            mixed_target, = gather_batch(target)
        shares = self._shares(has_dense=dense_logits is not None, dense_only=target is None)
        terms: dict[str, Any] = {}  # sum and divisor of each term
        if shares['dense']:
            attention = self._attention(dense_logits, attention, target, mask)
            dense_teacher = teacher.logits if teacher.dense_logits is None else teacher.dense_logits
            target_of_positions = mixed_target if dense_target is None else dense_target
            terms['dense'] = self._mixed(dense_logits, target_of_positions, attention, dense_teacher, distillation)
        if shares['pooled']:
            terms['pooled'] = self._mixed(logits.unsqueeze(1), mixed_target, None, teacher.logits, distillation)
        if shares['clean']:
            terms['clean'] = self._clean(logits, target, teacher.logits, distillation)
        if self.gather:
            sums = mean_over_processes(torch.stack([torch.stack(pair) for pair in terms.values()]))
            terms = dict(zip(terms, sums, strict=True))
        terms = {name: mean(*pair) for name, pair in terms.items()}
        return {'loss': sum(shares[name] * term for name, term in terms.items()), **terms}

    def _check_inputs(
            self,
            logits: Any,
            dense_logits: Any,
            target: torch.Tensor | None,
            mask: torch.Tensor | None,
            dense_target: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Check the inputs, and return target, mask and dense_target. Ignored positions are added to the mask."""
        check_output(logits, dense_logits, target, dense_target)
        check_num_classes((dense_logits if target is None else logits).shape[-1], self.loss_type)
        if target is not None:
            target = self._cast(target, logits)
            check_target(logits, target)
        if mask is not None and dense_logits is not None:
            mask = check_mask(mask, dense_logits.shape[:2])
        if dense_target is not None:
            dense_target = self._cast(dense_target, dense_logits)
            dense_target, mask = check_dense_target(dense_logits, dense_target, mask, self.ignore_index)
        return target, mask, dense_target

    def _cast(self, target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cast integer multi-hot targets, which have as many axes as the logits."""
        is_multi_hot = self.loss_type == 'bce' and target.ndim == logits.ndim
        return multi_hot(target, loss_dtype(logits)) if is_multi_hot else target

    def _shares(self, has_dense: bool, dense_only: bool) -> dict[str, float]:
        """Return the weight of each term."""
        clean = 0.0 if dense_only else self.clean_weight
        pooled = 0.0 if dense_only else self.pooled_weight if has_dense else 1.0
        return dict(dense=(1 - clean) * (1 - pooled), pooled=(1 - clean) * pooled, clean=clean)

    def _targets(self, target: torch.Tensor, teacher: torch.Tensor | None, num_classes: int) -> Targets:
        is_binary = self.loss_type == 'bce'
        buffers: Any = (self.weight, self.pos_weight)
        class_weights = check_class_weights(ClassWeights(*buffers), num_classes, is_binary)
        return make_targets(target, num_classes, class_weights, self.smoothing, teacher, is_binary)

    def _mean_over_classes(self, total: torch.Tensor, num_classes: int) -> torch.Tensor:
        return total if self.loss_type == 'ce' else total / num_classes

    def _attention(
            self,
            dense_logits: torch.Tensor,
            attention: torch.Tensor | None,
            target: torch.Tensor | None,
            mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Return the attention, which is 0 at padding. It is the mask for uniform attention, or None without a mask."""
        if self.attention == 'cam':
            attention = attention_map(None, dense_logits, target, query='cam', norm=self.attention_norm, mask=mask)
        elif self.attention == 'uniform':
            attention = None
        if attention is None:
            return mask
        if mask is not None and attention.shape == mask.shape:
            attention = attention.masked_fill(~mask, 0)
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses of the mixes of logits (b, r, c), and its divisor."""
        teacher = teacher_rows(logits, teacher, distillation.weight)
        if self.gather:
            teacher = teacher.expand_as(logits) if teacher is not None else None
            is_dense = target.ndim == (3 if target.is_floating_point() else 2)
            shared: Any = share_positions(logits, attention, teacher, target if is_dense else None)
            logits, attention, teacher, target_of_positions = shared
            target = target_of_positions if is_dense else target
            if not logits.shape[1]:
                # There are more processes than positions. This process has no loss, but it must take part in the
                # collectives of the backward pass. The sum of empty tensors keeps them in a compiled graph.
                received = (tensor for tensor in (logits, attention, teacher, target) if tensor is not None)
                total: Any = sum(tensor[:0].sum(dtype=loss_dtype(logits)) for tensor in received)
                return total, torch.zeros_like(total)
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
        loss = FusedLoss(
            PARTITIONS[self.loss_type],
            self.num_mixes,
            self.balance,
            self.logit_scale,
            self.tile_size,
            distillation,
        )
        total, divisor = FusedLossFunction.apply(
            logits, sample() if self.shared_weights else sample, attention, loss,
            *self._targets(target, teacher, num_classes))
        return self._mean_over_classes(total, num_classes), divisor

    def _clean(
            self,
            logits: torch.Tensor,
            target: Any,
            teacher: torch.Tensor | None,
            distillation: Distillation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses of the examples, and its divisor."""
        batch_size, num_classes = logits.shape
        logits = logits.to(loss_dtype(logits))
        teacher = teacher_rows(logits.unsqueeze(1), teacher, distillation.weight)
        targets = self._targets(target, teacher, num_classes)
        if teacher is not None:
            identity = torch.eye(batch_size, device=logits.device)
            loss = FusedLoss(PARTITIONS[self.loss_type], batch_size, distillation=distillation)
            total, divisor = FusedLossFunction.apply(logits.unsqueeze(1), identity, None, loss, *targets)
        else:
            rows, normalizer, _, *weights = targets
            function = F.cross_entropy if self.loss_type == 'ce' else partial(
                F.binary_cross_entropy_with_logits, pos_weight=weights[1])
            total = function(logits, rows.to(logits.dtype), weights[0], reduction='sum')
            divisor = logits.new_full((), batch_size) if normalizer is None else normalizer.sum()
        return self._mean_over_classes(total, num_classes), divisor
