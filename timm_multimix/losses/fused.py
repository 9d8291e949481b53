"""Value and gradient of MultiMix losses in one pass over the mixes.

MultiMix is a loss on logits: the classifier is affine and every row of weights sums to 1, so mixing embeddings and then
classifying them is mixing their logits. With the log-partition A of the loss (logsumexp for cross-entropy, softplus for
binary cross-entropy), the loss of the n mixes at one position, and its gradient G for the logits, are

    mean_k A(M_k L) - M_k Y · M_k L        and        G = Mᵀ R / n,    R_k = A'(M_k L) - M_k Y.

In cross-entropy, A is multiplied by the sum of M_k Y. With class weights or positive weights, both terms have factors
that are linear in M_k Y.

Let w be the mean of the rows of M. The rows of M sum to 1, so the columns of M - w sum to zero, and

    G = w (1ᵀG) + C,    1ᵀG = mean_k R_k,    C = (M - w)ᵀ R / n.

Balancing multiplies C by κ. The part that is linear in Y needs no mixed logits: it comes from w and the covariance
K = (M - w)ᵀ(M - w) / n. The mixed logits M L (n x c) are formed in tiles and never kept. docs/method.md has the
derivation. Rows of M that are zero, since no example of the mix has attention at the position, are left out: n and all
means are then over the other rows.

A teacher adds the term A(M_k L) - A'(M_k L')·M_k L, where L' are the teacher's logits.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .targets import Targets, loss_dtype
from .weights import attended_rows, check_count

# Limit on the elements of the weights (p, n, b) of the positions in memory, and of a tile of mixed logits. On a CPU a
# tile should fit the cache of a core. At least one position is in memory, with all its weights.
ELEMENTS_AT_A_TIME = 2 ** 24
ELEMENTS_AT_A_TIME_CPU = 2 ** 19


class Inputs(NamedTuple):  # without _replace and properties, which torch.compile of PyTorch 2.6 does not trace
    """The inputs of the loss at p positions."""
    m: torch.Tensor                 # attended weights M (p, n, b)
    rows: torch.Tensor              # 1 for rows of M, 0 for rows that are left out (p, n, 1)
    logits: torch.Tensor            # L (p, b, c), scaled
    teacher: torch.Tensor | None    # L' (p, b, c), scaled and divided by the temperature
    target: torch.Tensor            # Y (b, c) or (p, b, c), weighted, times the share of classification
    share: torch.Tensor             # factor of A, as target but with 1 or c classes
    targets: Targets                # for the class weights

    def tile(self, positions: slice, rows: slice) -> 'Inputs':
        """Select positions, and rows of M."""
        target, share = (tensor[positions] if tensor.ndim == 3 else tensor for tensor in (self.target, self.share))
        teacher = None if self.teacher is None else self.teacher[positions]
        return Inputs(
            self.m[positions, rows], self.rows[positions, rows], self.logits[positions], teacher, target, share,
            self.targets)

    def mixed_by(self, m: torch.Tensor) -> 'Inputs':
        """Return the inputs with other weights."""
        return Inputs(m, self.rows, self.logits, self.teacher, self.target, self.share, self.targets)

    def scales_rows(self) -> bool:
        """Return whether the derivative of every row is A' times one factor, its share."""
        return self.teacher is None and self.share.shape[-1] == 1


def _sum_classes(value: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return the sum over classes (p, t, 1) of A times its factor. The last axes have 1 or c elements."""
    return share * value.sum(dim=-1, keepdim=True) if share.shape[-1] == 1 else (share * value).sum(-1, keepdim=True)


def kappa(w: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Return the factor κ of C in the balanced gradient (p, 1, 1).

    w (p, 1, b) is the mean of the rows of M. The spread (p, 1, 1) is the trace of their covariance K, S - Σw², where S
    is the mean of the rows' sums of squares.
    """
    w_square = w.square().sum(dim=2, keepdim=True)
    # If all rows are equal, C is zero and κ undefined.
    equal = spread <= 8 * torch.finfo(w.dtype).eps * (spread + w_square)
    return torch.where(equal, 1, (1 - w_square) / spread.masked_fill(equal, 1))


def _elements_at_a_time(tensor: torch.Tensor) -> int:
    return ELEMENTS_AT_A_TIME_CPU if tensor.device.type == 'cpu' else ELEMENTS_AT_A_TIME


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def check_distillation(distill_weight: float, distill_temperature: float) -> None:
    if not 0 <= distill_weight <= 1:
        raise ValueError(f'distill_weight must be in [0, 1], got {distill_weight}.')
    if not 0 < distill_temperature < math.inf:
        raise ValueError(f'distill_temperature must be positive, got {distill_temperature}.')


def check_scale(logit_scale: float) -> None:
    if not (isinstance(logit_scale, Real) and 0 < logit_scale < math.inf):
        raise ValueError(f'logit_scale must be a positive number, got {logit_scale!r}.')


@dataclass(frozen=True)
class FusedLoss:
    """Loss of `num_mixes` mixes at every position, summed over classes. See MultiMixLoss for the options."""
    is_binary: bool
    num_mixes: int
    balance: bool
    logit_scale: float
    tile_size: int | None
    distill_weight: float
    distill_temperature: float

    def __post_init__(self) -> None:
        check_distillation(self.distill_weight, self.distill_temperature)
        check_scale(self.logit_scale)
        check_count('tile_size', self.tile_size)

    def positions_at_a_time(self, logits: torch.Tensor) -> int:
        """Return the number of positions whose weights (p, n, b) and logits (p, b, c) are in memory together.

        Weights are drawn for that many positions at once, so it must not depend on tile_size.
        """
        batch_size, num_positions, num_classes = logits.shape
        elements_of_a_position = batch_size * max(2 * self.num_mixes, num_classes)
        return min(num_positions, max(1, 2 * _elements_at_a_time(logits) // elements_of_a_position))

    def tiles(self, logits: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """Yield the positions and rows of the tiles of mixed logits, for logits (p, b, c)."""
        num_positions, _, num_classes = logits.shape
        elements = _elements_at_a_time(logits)
        num_tiles = -(-self.num_mixes * num_classes // elements)
        num_rows = self.tile_size or -(-self.num_mixes // num_tiles)
        for positions in _slices(num_positions, max(1, elements // (num_rows * num_classes))):
            for rows in _slices(self.num_mixes, num_rows):
                yield positions, rows

    def partition(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A of mixed logits (..., c), with 1 or c classes, and its derivative A' (..., c), the prediction."""
        if self.is_binary:
            return F.softplus(mixed), mixed.sigmoid()
        probabilities = mixed.softmax(dim=-1)
        # The largest probability is exp(largest logit - logsumexp). It cannot underflow.
        return mixed.amax(dim=-1, keepdim=True) - probabilities.amax(dim=-1, keepdim=True).log(), probabilities

    def inputs(
            self,
            m: torch.Tensor,
            rows: torch.Tensor,
            logits: torch.Tensor,
            teacher: torch.Tensor | None,
            targets: Targets,
    ) -> Inputs:
        """Return the inputs at p positions, for logits (p, b, c) and targets at these positions."""
        target, share = targets.factors(targets.rows, self.is_binary)
        if teacher is not None:
            target, share = target * (1 - self.distill_weight), share * (1 - self.distill_weight)
        return Inputs(m, rows, logits, teacher, target, share, targets)

    def value_and_gradient(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, summed over mixes and positions, and its gradient for the logits (p, b, c)."""
        m, rows, logits, target = inputs.m, inputs.rows, inputs.logits, inputs.target
        num_rows = rows.sum(dim=1, keepdim=True).clamp_(min=1)
        total = m.sum(dim=1, keepdim=True)
        w = total / num_rows
        centered = torch.cat([(m - w).mul_(rows), rows], dim=-1)            # the column of ones gives 1ᵀG
        weighted = centered * (m @ inputs.share) if inputs.scales_rows() else centered
        # The derivatives of different rows differ little. Products that round operands would lose the differences.
        # So the derivative at w is subtracted from every row first, and its product is added separately.
        _, constant = self.row_losses(inputs.mixed_by(w))
        value = logits.new_zeros(())
        sums = weighted.sum(dim=1).unsqueeze(-1) * constant
        for positions, tile_rows in self.tiles(logits):
            tile = inputs.tile(positions, tile_rows)
            losses, derivative = self.row_losses(tile)
            value += (losses * tile.rows).sum()
            sums[positions] += weighted[positions, tile_rows].mT @ derivative.sub_(constant[positions])
        c, common = sums[:, :-1], sums[:, -1:]                              # n C (p, b, c) and n 1ᵀG (p, 1, c)
        # The part of value and gradient that is linear in the targets.
        covariance = centered[..., :-1].mT @ centered[..., :-1]             # n K
        # The diagonal has sums of n squares. Some matrix products add them in order. sum() rounds less often.
        covariance.diagonal(dim1=1, dim2=2).copy_(centered[..., :-1].square().sum(dim=1))
        mixed_target, covariant_target = total @ target, covariance @ target
        value = value - (covariant_target * logits).sum() - (mixed_target * (w @ logits)).sum()
        c, common = c - covariant_target, common - mixed_target
        if self.balance:
            c = kappa(w, covariance.diagonal(dim1=1, dim2=2).sum(dim=-1)[:, None, None] / num_rows) * c
        return value, c.addcmul_(w.mT, common)

    def row_losses(self, tile: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of every row (p, t, 1) and its derivative for the mixed logits (p, t, c).

        Both are without the part that is linear in the targets. If the inputs scale rows, the derivative has to be
        multiplied by the share of the row.
        """
        mixed = tile.m @ tile.logits
        value, prediction = self.partition(mixed)
        share = tile.m @ tile.share
        losses = _sum_classes(value, share)
        if tile.teacher is not None:
            distilled, derivative = self._distill(mixed, value, prediction, tile, tile.m @ tile.teacher)
            return losses + distilled, derivative.addcmul_(share, prediction)
        return losses, prediction if tile.scales_rows() else share * prediction

    def _distill(
            self,
            mixed: torch.Tensor,
            value: torch.Tensor,
            prediction: torch.Tensor,
            tile: Inputs,
            mixed_teacher: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distillation term of every row (p, t, 1) and its derivative for the mixed logits (p, t, c)."""
        weight, temperature, targets = self.distill_weight, self.distill_temperature, tile.targets
        _, target = self.partition(mixed_teacher)
        if temperature != 1:
            mixed = mixed / temperature
            value, prediction = self.partition(mixed)
        if targets.weight is not None or targets.pos_weight is not None:
            target, share = targets.factors(target, self.is_binary)
            value, prediction = _sum_classes(value, share), share * prediction
        distilled = value.sum(dim=-1, keepdim=True) - (target * mixed).sum(dim=-1, keepdim=True)
        return weight * temperature ** 2 * distilled, (prediction - target).mul_(weight * temperature)

    def gradient_of_weights(self, inputs: Inputs) -> torch.Tensor:
        """Return the gradient of the loss, summed over mixes and positions, for the weights M (p, n, b), unbalanced."""
        def loss(m: torch.Tensor, tile: Inputs) -> torch.Tensor:
            losses, _ = self.row_losses(tile.mixed_by(m))
            return (losses * tile.rows).sum() - ((m @ tile.target) * (m @ tile.logits)).sum()

        grad = torch.empty_like(inputs.m)
        for positions, rows in self.tiles(inputs.logits):
            tile = inputs.tile(positions, rows)
            grad[positions, rows] = torch.func.grad(loss)(tile.m, tile)
        return grad


def _positions_first(
        logits: torch.Tensor,
        positions: slice,
        attention: torch.Tensor | None,
        scale: float,
        dtype: torch.dtype,
) -> torch.Tensor:
    """Select positions of logits (b, r, c) and scale them: (p, b, c). Logits without attention are replaced by 0."""
    logits = logits[:, positions].to(dtype)
    if attention is not None:
        logits = torch.where((attention[:, positions] != 0).unsqueeze(-1), logits, 0)
    logits = logits.transpose(0, 1)
    return (logits if scale == 1 else logits * scale).contiguous()


def _weights_at(
        positions: slice,
        weights: torch.Tensor | Callable[..., torch.Tensor],
        attention: torch.Tensor | None,
        dtype: torch.dtype,
        needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the attended weights M (p, n, b), their rows (see Inputs), and the vector-Jacobian product of M.

    The product is for the attention (b, p), or for the weights (p, n, b) without attention.
    """
    size = positions.stop - positions.start
    is_given = isinstance(weights, torch.Tensor) and weights.ndim == 3
    m = weights(num_positions=size) if callable(weights) else weights[positions] if is_given else weights
    m = m.to(dtype)
    if attention is None:
        m = m.expand(size, -1, -1)
        return m, (m.sum(dim=-1, keepdim=True) != 0).to(dtype), lambda grad: grad
    attention = attention[:, positions]
    if needs_grad:
        result: Any = torch.func.vjp(partial(attended_rows, m), attention.to(dtype), has_aux=True)
        m, vjp, rows = result
        return m, rows, lambda grad: vjp(grad)[0]
    m, rows = attended_rows(m, attention if attention.dtype == torch.bool else attention.to(dtype))
    return m, rows, None


class FusedLossFunction(torch.autograd.Function):
    """Sum of a FusedLoss over mixes and positions, and its divisor. The forward pass computes the gradients.

    Args of apply:
        logits: Logits (b, r, c).
        weights: Weights (r, n, b), weights (n, b) shared by all positions, or a function that draws weights
            (p, n, b) for `num_positions=p`. Rows that are zero are left out.
        attention: Attention (b, r) that the weights are attended with, a mask (b, r) for uniform attention, or None.
            Positions without attention have no effect, and rows without attention are left out.
        loss: The FusedLoss.
        targets: The entries of Targets.

    Returns:
        The sum, and the number of rows or the sum of their normalizers. Gradients: for logits, balanced or not; for
        attention; for weights (r, n, b) if there is no attention.
    """

    @staticmethod
    def forward(
            ctx: Any,
            logits: torch.Tensor,
            weights: Any,
            attention: torch.Tensor | None,
            loss: FusedLoss,
            *targets: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = loss_dtype(logits)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            value, divisor, *grads = FusedLossFunction._evaluate(
                logits, weights, attention, Targets(*targets).to(dtype), loss, *ctx.needs_input_grad[1:3])
        ctx.save_for_backward(*grads)
        ctx.dtypes = [getattr(tensor, 'dtype', None) for tensor in (logits, weights, attention)]
        return value, divisor

    @staticmethod
    def _evaluate(
            logits: torch.Tensor,
            weights: torch.Tensor | Callable[..., torch.Tensor],
            attention: torch.Tensor | None,
            targets: Targets,
            loss: FusedLoss,
            needs_weights_grad: bool,
            needs_attention_grad: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Return the sum, the divisor and the gradient of the sum for the logits.

        If the attention or the weights need gradients, the gradient of the sum for them follows, and the gradient of
        a divisor that depends on them.
        """
        value, divisor = targets.rows.new_zeros(()), targets.rows.new_zeros(())
        dtype, scale = value.dtype, loss.logit_scale
        grad = torch.empty_like(logits, dtype=dtype)
        source: Any = attention if needs_attention_grad else weights
        axis = 1 if needs_attention_grad else 0
        num_grads = (needs_weights_grad or needs_attention_grad) * (1 if targets.normalizer is None else 2)
        source_grads = [torch.empty_like(source, dtype=dtype) for _ in range(num_grads)]
        for positions in _slices(logits.shape[1], loss.positions_at_a_time(logits)):
            m, rows, vjp = _weights_at(positions, weights, attention, dtype, needs_attention_grad)
            here = targets.at(positions)
            teacher = targets.teacher if targets.teacher is None else _positions_first(
                targets.teacher.expand_as(logits), positions, attention, scale / loss.distill_temperature, dtype)
            inputs = loss.inputs(m, rows, _positions_first(logits, positions, attention, scale, dtype), teacher, here)
            chunk_value, chunk_grad = loss.value_and_gradient(inputs)
            value += chunk_value
            grad[:, positions] = chunk_grad.transpose(0, 1)
            divisor += (rows if here.normalizer is None else m.sum(dim=1, keepdim=True) * here.normalizer).sum()
            if source_grads:
                m_grads = [loss.gradient_of_weights(inputs)]
                if here.normalizer is not None:
                    m_grads.append(here.normalizer)
                for total, m_grad in zip(source_grads, m_grads, strict=True):
                    total.narrow(axis, positions.start, len(m)).copy_(vjp(m_grad.expand_as(m)))
        return value, divisor, grad.mul_(scale), *source_grads

    @staticmethod
    def backward(ctx: Any, grad_value: torch.Tensor, grad_divisor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'MultiMix losses can be differentiated once: no create_graph=True, and no second-order optimizer.')
        # A gradient is scaled before it is cast: in float16 it would underflow without the loss scaler's factor.
        grad, *source_grads = ctx.saved_tensors
        grads = [(grad * grad_value).to(ctx.dtypes[0]), None, None]
        for index in (1, 2):
            if ctx.needs_input_grad[index]:
                outer = (grad_value, grad_divisor)[:len(source_grads)]
                total = sum(part * factor for part, factor in zip(source_grads, outer, strict=True))
                grads[index] = total.to(ctx.dtypes[index])
        return *grads, *[None] * (1 + len(Targets._fields))
