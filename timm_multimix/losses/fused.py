"""Value and gradient of MultiMix losses in one pass over the mixes.

MultiMix is a loss on logits: the classifier is affine and every row of weights sums to 1, so mixing embeddings and then
classifying them is mixing their logits. With the log-partition A of the loss (logsumexp for cross-entropy, softplus for
binary cross-entropy), the loss of the n mixes at one position, and its gradient G for the logits, are

    mean_k A(M_k L) - M_k Y · M_k L        and        G = Mᵀ R / n,    R_k = A'(M_k L) - M_k Y.

(In cross-entropy with targets that do not sum to 1, A is multiplied by the sum of M_k Y.)

Let w be the mean of the rows of M. The rows of M sum to 1, so the columns of M - w sum to zero, and

    G = w (1ᵀG) + C,    1ᵀG = mean_k R_k,    C = (M - w)ᵀ R / n.

Balancing multiplies C by κ. What is linear in Y needs no mixed logits: it comes from w and the covariance
K = (M - w)ᵀ(M - w) / n. The mixed logits M L (n x c) are formed in tiles and never kept. docs/method.md has the
derivation.

A teacher adds the term A(M_k L) - A'(M_k L')·M_k L, where L' are the teacher's logits.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .weights import attend

# Limit on the elements of the weights (p, n, b) of the positions in memory, and of a tile of mixed logits. On a CPU a
# tile should fit the cache of a core. At least one position is in memory, with all its weights.
ELEMENTS_AT_A_TIME = 2 ** 24
ELEMENTS_AT_A_TIME_CPU = 2 ** 19

# Takes mixed logits (..., c). Returns the log-partition A (..., 1) and its derivative A' (..., c), the prediction.
Partition = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def softmax_partition(mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logsumexp and softmax."""
    probabilities = mixed.softmax(dim=-1)
    # The largest probability is exp(largest logit - logsumexp). It cannot underflow.
    return mixed.amax(dim=-1, keepdim=True) - probabilities.amax(dim=-1, keepdim=True).log(), probabilities


def sigmoid_partition(mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softplus, summed over classes, and sigmoid."""
    return F.softplus(mixed).sum(dim=-1, keepdim=True), mixed.sigmoid()


class Distillation(NamedTuple):
    """Options of the distillation term.

    Attributes:
        weight: Share of the distillation term. The share of classification is 1 - weight.
        temperature: Divides the mixed logits of student and teacher in the distillation term. The term is multiplied
            by its square.
    """
    weight: float
    temperature: float = 1.0


class Inputs(NamedTuple):
    """The inputs of the loss at p positions."""
    m: torch.Tensor                 # attended weights M (p, n, b)
    logits: torch.Tensor            # L (p, b, c), scaled
    target: torch.Tensor            # Y (b, c), times the share of classification
    teacher: torch.Tensor | None    # L' (p, b, c), scaled and divided by the temperature

    def tile(self, positions: slice, rows: slice) -> 'Inputs':
        """Select positions, and rows of M."""
        teacher = None if self.teacher is None else self.teacher[positions]
        return Inputs(self.m[positions, rows], self.logits[positions], self.target, teacher)


def kappa(w: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Factor κ of C in the balanced gradient (p, 1, 1).

    Args:
        w: Mean of the rows of M (p, 1, b).
        covariance: Covariance K of the rows (p, b, b). Its trace is S - Σw², S the mean of the rows' sums of squares.
    """
    w_square = w.square().sum(dim=(1, 2))
    spread = covariance.diagonal(dim1=1, dim2=2).sum(dim=-1)
    # If all rows are equal, C is zero and κ undefined.
    equal = spread <= 8 * torch.finfo(w.dtype).eps * (spread + w_square)
    return torch.where(equal, 1, (1 - w_square) / spread.masked_fill(equal, 1))[:, None, None]


def _elements_at_a_time(tensor: torch.Tensor) -> int:
    return ELEMENTS_AT_A_TIME_CPU if tensor.device.type == 'cpu' else ELEMENTS_AT_A_TIME


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


@dataclass(frozen=True)
class FusedLoss:
    """The loss of `num_mixes` mixes at every position, summed over classes."""
    partition: Partition
    num_mixes: int
    balance: bool = True
    logit_scale: float = 1.0
    tile_size: int | None = None
    distillation: Distillation | None = None

    def positions_at_a_time(self, logits: torch.Tensor) -> int:
        """Number of positions whose weights (p, n, b) and logits (p, b, c) are in memory together.

        Weights are drawn for that many positions at once, so it must not depend on tile_size.
        """
        batch_size, num_positions, num_classes = logits.shape
        elements_of_a_position = batch_size * max(2 * self.num_mixes, num_classes)
        return min(num_positions, max(1, 2 * _elements_at_a_time(logits) // elements_of_a_position))

    def tiles(self, logits: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """Positions and rows of the tiles of mixed logits, for logits (p, b, c)."""
        num_positions, _, num_classes = logits.shape
        elements = _elements_at_a_time(logits)
        num_tiles = -(-self.num_mixes * num_classes // elements)
        num_rows = self.tile_size or -(-self.num_mixes // num_tiles)
        for positions in _slices(num_positions, max(1, elements // (num_rows * num_classes))):
            for rows in _slices(self.num_mixes, num_rows):
                yield positions, rows

    def value_and_gradient(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, summed over positions, and its gradient for the logits (p, b, c)."""
        m, logits, target, _ = inputs
        w = m.mean(dim=1, keepdim=True)
        centred = torch.cat([m - w, torch.ones_like(m[..., :1])], dim=-1)   # the column of ones gives 1ᵀG
        factor = self.share(inputs) if inputs.teacher is None else torch.ones_like(m[..., :1])
        weighted = centred * factor
        # The derivatives of different rows differ little. Products that round operands would lose the differences.
        # So the derivative at w is subtracted from every row first, and its product is added separately.
        _, constant = self.row_losses(inputs._replace(m=w))
        value = logits.new_zeros(())
        sums = weighted.sum(dim=1).unsqueeze(-1) * constant
        for positions, rows in self.tiles(logits):
            losses, derivative = self.row_losses(inputs.tile(positions, rows))
            value += losses.sum()
            sums[positions] += weighted[positions, rows].mT @ derivative.sub_(constant[positions])
        c, common = (sums / self.num_mixes).split([m.shape[-1], 1], dim=1)  # C (p, b, c) and 1ᵀG (p, 1, c)
        # The part of value and gradient that is linear in the targets.
        covariance = centred[..., :-1].mT @ centred[..., :-1] / self.num_mixes
        mixed_target, covariant_target = w @ target, covariance @ target
        value = value / self.num_mixes - (covariant_target * logits).sum() - (mixed_target * (w @ logits)).sum()
        c, common = c - covariant_target, common - mixed_target
        if self.balance:
            c = kappa(w, covariance) * c
        return value, c.addcmul_(w.mT, common)

    def share(self, tile: Inputs) -> torch.Tensor:
        """Factor of A in the classification term of every row (p, t, 1).

        For cross-entropy it is the sum of the row's mixed target.
        """
        if self.partition is softmax_partition:
            return (tile.m @ tile.target.sum(dim=1)).unsqueeze(-1)
        return torch.full_like(tile.m[..., :1], 1.0 if tile.teacher is None else 1 - self.distillation.weight)

    def row_losses(self, tile: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of every row (p, t, 1) and its derivative for the mixed logits (p, t, c).

        Both are without the part that is linear in the targets. Without a teacher the derivative has to be multiplied
        by the share of the row.
        """
        mixed = tile.m @ tile.logits
        value, prediction = self.partition(mixed)
        share = self.share(tile)
        losses = share * value
        if tile.teacher is None:
            return losses, prediction
        weight, temperature = self.distillation
        _, teacher_prediction = self.partition(tile.m @ tile.teacher)
        soft_prediction = prediction
        if temperature != 1:
            mixed = mixed / temperature
            value, soft_prediction = self.partition(mixed)
        distilled = value - (teacher_prediction * mixed).sum(dim=-1, keepdim=True)
        losses = losses + weight * temperature ** 2 * distilled
        derivative = (soft_prediction - teacher_prediction).mul_(weight * temperature)
        return losses, derivative.addcmul_(share, prediction)

    def gradient_of_weights(self, inputs: Inputs) -> torch.Tensor:
        """Gradient of the loss, summed over positions, for the weights M (p, n, b). It is not balanced."""
        def loss(m: torch.Tensor, tile: Inputs) -> torch.Tensor:
            losses, _ = self.row_losses(tile._replace(m=m))
            return losses.sum() - ((m @ tile.target) * (m @ tile.logits)).sum()

        grad = torch.empty_like(inputs.m)
        for positions, rows in self.tiles(inputs.logits):
            tile = inputs.tile(positions, rows)
            grad[positions, rows] = torch.func.grad(loss)(tile.m, tile)
        return grad / self.num_mixes


def _positions_first(logits: torch.Tensor, positions: slice, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Select positions of logits (b, r, c) and scale them: (p, b, c)."""
    return logits[:, positions].transpose(0, 1).to(dtype).mul(scale).contiguous()


class FusedLossFunction(torch.autograd.Function):
    """Mean of a FusedLoss over positions. The forward pass computes the gradients, the backward pass scales them.

    Args of apply:
        logits: Logits (b, r, c).
        weights: Weights (r, n, b), weights (n, b) shared by all positions, or a function that draws weights
            (p, n, b) for `num_positions=p`.
        attention: Attention (b, r) that the weights are attended with, or None.
        target: Target rows (b, c).
        teacher: The teacher's logits (b, r, c) or (b, 1, c), or None.
        loss: The FusedLoss.

    Gradients: for logits, balanced or not; for attention; for weights (r, n, b) if there is no attention.
    """

    @staticmethod
    def forward(ctx, logits, weights, attention, target, teacher, loss):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        with torch.autocast(device_type=logits.device.type, enabled=False):
            value, *grads = FusedLossFunction._evaluate(
                logits, weights, attention, target.to(dtype), teacher, loss, *ctx.needs_input_grad[1:3])
        ctx.save_for_backward(*grads)
        ctx.dtypes = [getattr(tensor, 'dtype', None) for tensor in (logits, weights, attention)]
        return value

    @staticmethod
    def _evaluate(
            logits: torch.Tensor,
            weights: torch.Tensor | Callable[..., torch.Tensor],
            attention: torch.Tensor | None,
            target: torch.Tensor,
            teacher: torch.Tensor | None,
            loss: FusedLoss,
            needs_weights_grad: bool,
            needs_attention_grad: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the loss and the gradients for logits, weights and attention."""
        dtype, num_positions = target.dtype, logits.shape[1]
        value = target.new_zeros(())
        grad = torch.empty_like(logits, dtype=dtype)
        weights_grad = torch.empty_like(weights, dtype=dtype) if needs_weights_grad else None
        attention_grad = torch.empty_like(attention, dtype=dtype) if needs_attention_grad else None
        if teacher is not None:
            target = target * (1 - loss.distillation.weight)
            teacher = teacher.expand_as(logits)
        for positions in _slices(num_positions, loss.positions_at_a_time(logits)):
            size = positions.stop - positions.start
            if callable(weights):
                m = weights(num_positions=size).to(dtype)
            else:
                m = (weights if weights.ndim == 2 else weights[positions]).to(dtype)
            if needs_attention_grad:
                m, pull_back = torch.func.vjp(partial(attend, m), attention[:, positions].to(dtype))
            elif attention is not None:
                m = attend(m, attention[:, positions].to(dtype))
            inputs = Inputs(
                m.expand(size, -1, -1),
                _positions_first(logits, positions, dtype, loss.logit_scale),
                target,
                None if teacher is None else _positions_first(
                    teacher, positions, dtype, loss.logit_scale / loss.distillation.temperature))
            chunk_value, chunk_grad = loss.value_and_gradient(inputs)
            value += chunk_value
            grad[:, positions] = chunk_grad.transpose(0, 1)
            if needs_attention_grad:
                attention_grad[:, positions], = pull_back(loss.gradient_of_weights(inputs))
            if needs_weights_grad:
                weights_grad[positions] = loss.gradient_of_weights(inputs)
        grad *= loss.logit_scale
        grads = (None if g is None else g.div_(num_positions) for g in (grad, weights_grad, attention_grad))
        return value / num_positions, *grads

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'MultiMix losses can be differentiated once: no create_graph=True, and no second-order optimizer.')
        # A gradient is scaled before it is cast: in float16 it would underflow without the loss scaler's factor.
        grads = (
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *grads, None, None, None
