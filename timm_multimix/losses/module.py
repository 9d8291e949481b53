"""The output of an attached model, and MultiMix as a loss module."""
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from .attention import attention_map, check_attention
from .functional import check_smoothing, mean, teacher_rows
from .fused import FusedLoss, FusedLossFunction, check_scale
from .gather import check_same_sizes, gather_batch, mean_over_processes, share_positions
from .targets import check_class_weights, check_target, check_target_values, loss_dtype, make_targets
from .weights import Alpha, alpha_range, check_count, check_mask, is_eager_cpu, sample_weights

# Values of None arguments of MultiMixLoss for each preset.
PRESETS: dict[str, dict[str, Any]] = {
    'default': dict(alpha=None, balance=True, pooled_weight=0.5),
    'paper': dict(alpha=(0.5, 2.0), balance=False, pooled_weight=0.0),
}


class MultiMixOutput(NamedTuple):
    """Output of an attached model in training mode.

    Attributes:
        logits: Ordinary logits of the model (b, c). None if the loss has targets at every position only.
        dense_logits: Logits at every position (b, r, c), positions in row-major order, or None in pooled mode.
        attention: Attention of each example over its positions (b, r), or None for uniform attention. Positions with
            attention 0, such as padding, have no effect on the loss.
    """
    logits: torch.Tensor | None
    dense_logits: torch.Tensor | None = None
    attention: torch.Tensor | None = None


def as_output(output: MultiMixOutput | torch.Tensor, name: str = 'MultiMixLoss') -> MultiMixOutput:
    """Return an output of a model as MultiMixOutput."""
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
    MultiMix). `terms` describes the arguments of a call. The loss is a convex combination:

        (1 - clean_weight) * ((1 - pooled_weight) * dense + pooled_weight * pooled) + clean_weight * plain loss

    The dense term mixes the logits at every position, the pooled term mixes the ordinary logits. Without dense logits,
    pooled_weight is 1. The dense term is the mean over mixes and positions, without mixes whose examples all have
    attention 0 at the position. The loss keeps the weights of a few positions in memory, n·b numbers each. Nothing
    else grows with the number of mixes.

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
        attention_grad: Backpropagate through the attention. Attention that is exactly 0 marks padding, and its gradient
            is not computed from the logits there.
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
            DistributedDataParallel or FSDP, are equal to the results of one process with all examples. Every process
            draws the weights of its share of the positions, so generators should differ between processes. See
            docs/distributed.md.
        generator: Random number generator, by default PyTorch's generator of the device of the logits.
        tile_size: Number of mixes whose mixed logits are in memory together. It does not change the result.

    Raises:
        ValueError: If an option is out of range, or the shapes of the inputs do not match.
    """
    weight: torch.Tensor | None
    pos_weight: torch.Tensor | None

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
        chosen = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
        self.num_mixes = num_mixes
        self.alpha: Alpha | None = chosen['alpha']
        self.tuple_length = tuple_length
        self.shared_weights = shared_weights
        self.attention = attention
        self.attention_norm = attention_norm
        self.attention_grad = attention_grad
        self.balance = bool(chosen['balance'])
        self.pooled_weight: float = chosen['pooled_weight']
        self.clean_weight = clean_weight
        self.logit_scale = logit_scale
        self.smoothing = smoothing
        self.loss_type = loss_type
        self.register_buffer('weight', weight)
        self.register_buffer('pos_weight', pos_weight)
        self.ignore_index = ignore_index
        self.gather = gather
        self.generator = generator
        self.tile_size = tile_size
        check_class_weights(weight=weight, pos_weight=pos_weight)
        self._check_options()

    def _check_options(self) -> None:
        for name in ('num_mixes', 'tuple_length', 'tile_size'):
            check_count(name, getattr(self, name))
        if self.attention not in (None, 'uniform', 'cam'):
            raise ValueError(
                f"attention must be 'cam', 'uniform' or None (attention of the output), got {self.attention!r}. Pass "
                'other queries to attach().')
        for name in ('pooled_weight', 'clean_weight'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name} must be in [0, 1], got {getattr(self, name)}.')
        check_scale(self.logit_scale)
        if self.loss_type not in ('ce', 'bce'):
            raise ValueError(f"loss_type must be one of ce, bce, got {self.loss_type!r}.")
        check_attention(self.attention or 'uniform', self.attention_norm)
        check_smoothing(self.smoothing)
        alpha_range(self.alpha, 1)  # checks alpha

    def extra_repr(self) -> str:
        return (
            f'num_mixes={self.num_mixes}, alpha={self.alpha}, tuple_length={self.tuple_length}, '
            f'balance={self.balance}, pooled_weight={self.pooled_weight}, clean_weight={self.clean_weight}, '
            f'logit_scale={self.logit_scale}')

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss, a scalar in float32 (float64 for float64 logits). The arguments are those of `terms`."""
        return self.terms(*args, **kwargs)['loss']

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
        loss = FusedLoss(
            self.loss_type == 'bce', self.num_mixes, self.balance, self.logit_scale, self.tile_size, distill_weight,
            distill_temperature)
        tensors: Any = as_output(output)  # _check_inputs and the shares of the terms determine which are not None
        logits, dense_logits, attention = tensors
        teacher = MultiMixOutput(None) if teacher is None else as_output(teacher, 'The teacher of MultiMixLoss')
        target, mask, dense_target = self._check_inputs(logits, dense_logits, target, mask, dense_target)
        mixed_target = self._gathered_target(logits, dense_logits, target)
        clean = 0.0 if target is None else self.clean_weight
        pooled = 0.0 if target is None else 1.0 if dense_logits is None else self.pooled_weight
        shares = dict(dense=(1 - clean) * (1 - pooled), pooled=(1 - clean) * pooled, clean=clean)
        terms: dict[str, Any] = {}  # sum and divisor of each term
        if shares['dense']:
            attention = self._attention(dense_logits, attention, target, mask)
            dense_teacher = teacher.logits if teacher.dense_logits is None else teacher.dense_logits
            target_of_positions = mixed_target if dense_target is None else dense_target
            terms['dense'] = self._mixed(loss, dense_logits, target_of_positions, attention, dense_teacher)
        if shares['pooled']:
            terms['pooled'] = self._mixed(loss, logits.unsqueeze(1), mixed_target, None, teacher.logits)
        if shares['clean']:
            terms['clean'] = self._clean(loss, logits.unsqueeze(1), target, teacher.logits)
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
        is_binary = self.loss_type == 'bce'
        if target is None and dense_target is None:
            raise ValueError('MultiMixLoss requires target, dense_target or both.')
        if dense_logits is None and (mask is not None or dense_target is not None):
            raise ValueError(
                'mask and dense_target require logits at every position: pass a MultiMixOutput with dense_logits.')
        if target is not None and (logits is None or logits.ndim != 2):
            raise ValueError(
                'MultiMixLoss expects logits (b, c) or a MultiMixOutput, got logits of shape '
                f'{None if logits is None else tuple(logits.shape)}. '
                'For logits at every position (b, r, c) use multimix_cross_entropy.')
        if dense_logits is not None:
            like, shape = dense_logits if logits is None else logits, dense_logits.shape
            if len(shape) != 3 or not shape[1] or shape[::2] != (len(like), like.shape[-1]):
                raise ValueError(
                    'dense_logits must have shape (b, r, c) with one or more positions, for logits (b, c), got '
                    f'{tuple(shape)} for logits {None if logits is None else tuple(logits.shape)}.')
        if not is_binary and (dense_logits if target is None else logits).shape[-1] == 1:
            raise ValueError(
                'The softmax cross-entropy of a single class is always 0, so the model is not trained: use binary '
                "cross-entropy (loss_type='bce') with targets (b, 1), or two classes.")
        if target is not None:
            target = check_target(target, logits.shape, is_binary)
            check_target_values(target, logits.shape[-1])
        if mask is not None:
            mask = check_mask(mask, dense_logits.shape[:2])
        if dense_target is not None:
            dense_target = check_target(dense_target, dense_logits.shape, is_binary, 'dense_target')
            if dense_target.ndim == 2:
                valid = dense_target != self.ignore_index
                mask = valid if mask is None else mask & valid
            if mask is not None:
                ignored = ~mask if dense_target.ndim == 2 else ~mask.unsqueeze(2)
                dense_target = dense_target.masked_fill(ignored, 0)
            check_target_values(dense_target, dense_logits.shape[-1])
        return target, mask, dense_target

    def _gathered_target(self, logits: Any, dense_logits: Any, target: Any) -> Any:
        """Return the target of the joined batch of all processes. Without gather the target is returned."""
        if not self.gather:
            return target
        like = dense_logits if logits is None else logits
        num_positions = 0 if dense_logits is None else dense_logits.shape[1]
        check_same_sizes((len(like), num_positions, like.shape[-1]), like.device)
        return target if target is None else gather_batch(target)

    def _attention(
            self,
            dense_logits: torch.Tensor,
            attention: torch.Tensor | None,
            target: torch.Tensor | None,
            mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Return the attention, 0 at padding. For uniform attention return the mask, which is None without padding."""
        if self.attention == 'cam':
            attention = attention_map(None, dense_logits, target, query='cam', norm=self.attention_norm, mask=mask)
        if attention is None or self.attention == 'uniform':
            return mask
        if attention.shape != dense_logits.shape[:2]:
            raise ValueError(
                f'attention must have shape (b, r) = {tuple(dense_logits.shape[:2])}, got {tuple(attention.shape)}.')
        if mask is not None:
            attention = attention.masked_fill(~mask, 0)
        # If the model has diverged, the attention can be NaN. The loss is NaN then.
        if is_eager_cpu(attention.device) and attention.min() < 0:
            raise ValueError('attention must not be negative. See attention_map.')
        return attention if self.attention_grad else attention.detach()

    def _mixed(
            self,
            loss: FusedLoss,
            logits: torch.Tensor,
            target: torch.Tensor,
            attention: torch.Tensor | None,
            teacher: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses of the mixes of logits (b, r, c), and its divisor."""
        teacher = teacher_rows(logits, teacher, loss.distill_weight)
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
        batch_size = len(logits)
        sample = partial(  # FusedLossFunction calls it for a few positions at a time
            sample_weights,
            self.num_mixes,
            batch_size,
            alpha=self.alpha,
            # The last batch of an epoch can be smaller than tuple_length.
            tuple_length=self.tuple_length and min(self.tuple_length, batch_size),
            generator=self.generator,
            device=logits.device,
        )
        return self._sum(loss, logits, sample() if self.shared_weights else sample, attention, target, teacher)

    def _clean(
            self,
            loss: FusedLoss,
            logits: torch.Tensor,
            target: Any,
            teacher: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses of the examples, with logits (b, 1, c), and its divisor."""
        loss = FusedLoss(  # torch.compile of PyTorch 2.6 does not trace dataclasses.replace
            loss.is_binary, len(logits), self.balance, 1.0, self.tile_size, loss.distill_weight,
            loss.distill_temperature)
        identity = torch.eye(len(logits), device=logits.device)
        return self._sum(loss, logits, identity, None, target, teacher_rows(logits, teacher, loss.distill_weight))

    def _sum(
            self,
            loss: FusedLoss,
            logits: torch.Tensor,
            weights: torch.Tensor | Callable[..., torch.Tensor],
            attention: torch.Tensor | None,
            target: torch.Tensor,
            teacher: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses of the mixes with these weights, and its divisor. See FusedLossFunction."""
        num_classes = logits.shape[-1]
        targets = make_targets(
            target, num_classes, self.smoothing, teacher, loss.is_binary, self.weight, self.pos_weight)
        total, divisor = FusedLossFunction.apply(logits, weights, attention, loss, *targets)
        return total / num_classes if loss.is_binary else total, divisor
