"""One pass over the mixes: value and gradient of MultiMix losses, tile by tile.

MultiMix is a loss on logits: the classifier is affine and every row of weights sums to 1, so mixing embeddings and then
classifying them is mixing their logits. Written with the log-partition A of the loss (logsumexp for cross-entropy,
softplus for binary cross-entropy), the loss of n mixes at one position is

    mean_k A(M_k L) - <(MᵀM / n) Y, L>,    its gradient for L:    Mᵀ A'(M L) / n - (MᵀM / n) Y.

Only A needs the mixed logits M L. They are formed tile by tile, value and gradient in the same pass, so nothing of size
n x c is kept, and the weights themselves can be drawn block by block. docs/method.md has the derivation.

A teacher adds a term A(M_k L) - A'(M_k L')·M_k L, whose targets are its own predictions A' of the same mixes of its
logits L'. They exist tile by tile too, and share the student's tiles.
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .weights import attend

# Elements of a tile of mixed logits, which should fit a core's cache, and of a block of freshly drawn weights. Blocks
# do not follow tiles: weights are drawn a block at a time, and the result may not depend on how the work is tiled.
TILE_ELEMENTS = 2 ** 18
BLOCK_ELEMENTS = 2 ** 18
MIN_ROWS = 64


class Partition(NamedTuple):
    """The log-partition A of a loss A(l) - y·l; its derivative A' is what the model predicts from l.

    Attributes:
        derivative: Takes mixed logits (p, t, c) and fills a tensor of that shape with A'.
        value: Takes mixed logits and their A'; returns A of every row (p, t).
        second: Takes A' and a direction of that shape; returns A'' times the direction.
        scales_with_target: Whether A is multiplied by the sum of the row's target, as logsumexp is in cross-entropy.
    """
    derivative: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    second: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    scales_with_target: bool


def _logsumexp(mixed: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    # The largest probability is exp(largest logit - logsumexp), which cannot underflow.
    return mixed.amax(dim=-1) - probabilities.amax(dim=-1).log_()


SOFTMAX = Partition(
    derivative=lambda mixed, out: torch.softmax(mixed, dim=-1, out=out),
    value=_logsumexp,
    second=lambda q, direction: q * (direction - (q * direction).sum(dim=-1, keepdim=True)),
    scales_with_target=True,
)
SIGMOID = Partition(
    derivative=lambda mixed, out: torch.sigmoid(mixed, out=out),
    value=lambda mixed, _: F.softplus(mixed).sum(dim=-1),
    second=lambda q, direction: q * (1 - q) * direction,
    scales_with_target=False,
)


class Distillation(NamedTuple):
    """How a teacher takes part in a loss.

    Attributes:
        weight: Share of the distillation term, the other being classification.
        temperature: Divides the mixed logits of both sides in that term, whose value is multiplied by its square.
    """
    weight: float
    temperature: float = 1.0


class GivenWeights:
    """Weights (r, n, b) that exist already."""

    def __init__(self, weights: torch.Tensor, dtype: torch.dtype, needs_grad: bool):
        self.weights = weights.to(dtype)
        self.grad = torch.empty_like(self.weights) if needs_grad else None

    def block(self, positions: slice, rows: slice) -> torch.Tensor:
        return self.weights[positions, rows]

    def backward(self, positions: slice, rows: slice, grad: torch.Tensor) -> None:
        self.grad[positions, rows] = grad


class DrawnWeights:
    """Weights drawn a block at a time, when they are needed, and attended with attention (b, r) or not at all."""

    def __init__(
            self,
            attention: torch.Tensor | None,
            dtype: torch.dtype,
            needs_grad: bool,
            *,
            sample: Callable[..., torch.Tensor],
    ):
        self.sample = sample
        self.dtype = dtype
        self.attention = attention.to(dtype) if attention is not None else None
        self.grad = torch.zeros_like(self.attention) if needs_grad else None

    def block(self, positions: slice, rows: slice) -> torch.Tensor:
        weights = self.sample(rows.stop - rows.start, num_positions=positions.stop - positions.start).to(self.dtype)
        if self.attention is None:
            return weights
        attention = self.attention[:, positions]
        attended = attend(weights, attention)
        if self.grad is not None:
            self._drawn = weights, attended, (weights * attention.mT.unsqueeze(1)).sum(dim=-1, keepdim=True)
        return attended

    def backward(self, positions: slice, rows: slice, grad: torch.Tensor) -> None:
        # By hand, not by autograd, which cannot be compiled in here: attended = weights * attention / total.
        weights, attended, total = self._drawn
        grad = grad - (grad * attended).sum(dim=-1, keepdim=True)
        grad = torch.where(total > 0, grad / total, 0)  # a row without attention does not depend on it
        self.grad[:, positions] += (weights * grad).sum(dim=1).mT


Weights = GivenWeights | DrawnWeights


def _block(logits: torch.Tensor, positions: slice, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Logits (b, r, c) of a block of positions, scaled, as (p, b, c)."""
    return logits[:, positions].transpose(0, 1).to(dtype).mul(scale).contiguous()


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _balance_gradient(grad: torch.Tensor, gram: torch.Tensor, num_mixes: int) -> torch.Tensor:
    """Replace G = w (1ᵀG) + C by w (1ᵀG) + κC at every position (docs/method.md, gradient balancing).

    Args:
        grad: Gradient of the loss with respect to the logits (p, b, c).
        gram: MᵀM at those positions (p, b, b). The rows of M sum to 1, so those of MᵀM sum to n w.
        num_mixes: Number of rows n of M.
    """
    w = gram.sum(dim=-1) / num_mixes
    mean_square = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / num_mixes  # S
    w_square = w.square().sum(dim=-1)
    spread = mean_square - w_square
    # Where all rows are alike, C is zero and κ undefined.
    alike = spread <= 8 * torch.finfo(gram.dtype).eps * mean_square
    kappa = torch.where(alike, 1, (1 - w_square) / spread.masked_fill(alike, 1))
    together = w.unsqueeze(-1) * grad.sum(dim=-2, keepdim=True)
    return torch.lerp(together, grad, kappa[:, None, None])


@dataclass(frozen=True)
class FusedLoss:
    """The loss of `num_mixes` mixes at every position, summed over classes; value and gradients in one pass."""
    partition: Partition
    num_mixes: int
    balance: bool = True
    logit_scale: float = 1.0
    tile_size: int | None = None
    distillation: Distillation | None = None

    def block_shape(self, num_positions: int, batch_size: int, num_classes: int) -> tuple[int, int]:
        """Positions and rows of a block of weights: functions of the problem only, not of the tile size."""
        rows = min(self.num_mixes, max(MIN_ROWS, BLOCK_ELEMENTS // batch_size))
        positions = min(BLOCK_ELEMENTS // (rows * batch_size), TILE_ELEMENTS // (rows * num_classes))
        return min(num_positions, max(1, positions)), rows

    def tile_rows(self, num_positions: int, num_classes: int) -> int:
        return self.tile_size or max(MIN_ROWS, TILE_ELEMENTS // (num_positions * num_classes))

    def evaluate(
            self,
            logits: torch.Tensor,
            target: torch.Tensor,
            teacher: torch.Tensor | None,
            weights: Weights,
            dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and its gradient for logits (b, r, c). Leaves the gradient of the weights in `weights`.

        Args:
            logits: Logits (b, r, c).
            target: Rows (b, c).
            teacher: The teacher's logits (b, r, c), or (b, 1, c) for all positions; None without a teacher.
            weights: Where the weights come from.
            dtype: Of the computation.
        """
        batch_size, num_positions, num_classes = logits.shape
        block_positions, block_rows = self.block_shape(num_positions, batch_size, num_classes)
        grad = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        loss = torch.zeros((), dtype=_sum_dtype(logits), device=logits.device)
        teacher_block = None
        if teacher is not None:
            teacher = teacher.expand(logits.shape)
            target = target * (1 - self.distillation.weight)
        for positions in _slices(num_positions, block_positions):
            block = _block(logits, positions, dtype, self.logit_scale)
            if teacher is not None:
                teacher_block = _block(
                    teacher, positions, dtype, self.logit_scale / self.distillation.temperature)
            block_loss, block_grad = self._evaluate_block(block, target, teacher_block, weights, positions, block_rows)
            loss += block_loss
            grad[:, positions] = block_grad.transpose(0, 1)
        mixes = self.num_mixes * num_positions
        if weights.grad is not None:
            weights.grad /= mixes
        return (loss / mixes).to(dtype), grad.mul_(self.logit_scale / mixes)

    def _evaluate_block(
            self,
            logits: torch.Tensor,
            target: torch.Tensor,
            teacher: torch.Tensor | None,
            weights: Weights,
            positions: slice,
            block_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient, summed over rows, of a block of positions: logits, teacher (p, b, c), target (b, c)."""
        slope = torch.zeros_like(logits)
        gram = logits.new_zeros(len(logits), logits.shape[1], logits.shape[1])
        loss = logits.new_zeros((), dtype=_sum_dtype(logits))
        for rows in _slices(self.num_mixes, block_rows):
            m = weights.block(positions, rows)
            gram.baddbmm_(m.mT, m)
            m_grad = torch.empty_like(m) if weights.grad is not None else None
            loss += self._evaluate_rows(m, logits, target, teacher, slope, m_grad)
            if m_grad is not None:
                weights.backward(positions, rows, m_grad)
        mixed_target = gram @ target
        loss -= (mixed_target * logits).sum(dtype=loss.dtype)
        grad = slope.sub_(mixed_target)
        return loss, _balance_gradient(grad, gram, self.num_mixes) if self.balance else grad

    def _evaluate_rows(
            self,
            m: torch.Tensor,
            logits: torch.Tensor,
            target: torch.Tensor,
            teacher: torch.Tensor | None,
            slope: torch.Tensor,
            m_grad: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add to slope (p, b, c) and fill m_grad (p, t, b), tile by tile; return the sum of the loss.

        Of the classification term this is A's part: what is linear in the target comes from the Gram matrix.
        """
        num_positions, num_rows, _ = m.shape
        mass = target.sum(dim=1) if self.partition.scales_with_target else None
        if m_grad is not None:
            agreement = target @ logits.mT
            agreement = agreement + agreement.mT
        tile_rows = min(num_rows, self.tile_rows(num_positions, logits.shape[-1]))
        buffers = logits.new_empty(2 if teacher is None else 4, num_positions, tile_rows, logits.shape[-1])
        total = logits.new_zeros((), dtype=_sum_dtype(logits))
        for rows in _slices(num_rows, tile_rows):
            tile = m[:, rows]
            mixed, scratch, *spare = buffers[:, :, :tile.shape[1]]
            torch.bmm(tile, logits, out=mixed)
            derivative = self.partition.derivative(mixed, scratch)
            value = self.partition.value(mixed, derivative)
            share = self._row_share(tile, mass, teacher)
            total += (value if share is None else value * share.squeeze(-1)).sum(dtype=total.dtype)
            if teacher is None:
                slope.baddbmm_((tile if share is None else tile * share).mT, derivative)
            else:
                term, residual, pull = self._distill(
                    tile, mixed, derivative, value, teacher, spare, m_grad is not None)
                total += term.sum(dtype=total.dtype)
                derivative = residual.addcmul_(derivative, share)
                slope.baddbmm_(tile.mT, derivative)
            if m_grad is not None:
                tile_grad = derivative @ logits.mT
                if teacher is not None:
                    tile_grad -= pull
                elif share is not None:
                    tile_grad *= share
                tile_grad -= tile @ agreement
                if mass is not None:
                    tile_grad += value.unsqueeze(-1) * mass
                m_grad[:, rows] = tile_grad
        return total

    def _row_share(
            self,
            tile: torch.Tensor,
            mass: torch.Tensor | None,
            teacher: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The factor of A in the classification term, for every row or for all; None for one."""
        if mass is not None:
            return (tile @ mass).unsqueeze(-1)
        return None if teacher is None else tile.new_full((1, 1, 1), 1 - self.distillation.weight)

    def _distill(
            self,
            tile: torch.Tensor,
            mixed: torch.Tensor,
            derivative: torch.Tensor,
            value: torch.Tensor,
            teacher: torch.Tensor,
            spare: Sequence[torch.Tensor],
            needs_pull: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The distillation term of a tile, A(l/T) - q·l/T with the teacher's predictions q of the same mixes.

        Args:
            tile: Rows of M (p, t, b).
            mixed: The student's mixed logits l (p, t, c); overwritten.
            derivative: Their A'.
            value: Their A.
            teacher: The teacher's logits, divided by the temperature T (p, b, c).
            spare: Two tensors of the shape of mixed, to work in.
            needs_pull: Whether to return what the rows of M do to q.

        Returns:
            The term of every row (p, t); its gradient for the mixed logits (p, t, c), in one of spare; and the part of
            its gradient for M that comes through q, negative (p, t, b), or None. All weighted.
        """
        weight, temperature = self.distillation
        teacher_mixed, predicted = spare
        torch.bmm(tile, teacher, out=teacher_mixed)
        predicted = self.partition.derivative(teacher_mixed, predicted)
        residual = teacher_mixed
        if temperature != 1:
            # the student at this temperature is another distribution than the one that classifies
            mixed = mixed.div_(temperature)
            derivative = self.partition.derivative(mixed, residual)
            value = self.partition.value(mixed, derivative)
        torch.sub(derivative, predicted, out=residual).mul_(weight * temperature)
        pull = None
        if needs_pull:
            pull = weight * temperature ** 2 * (self.partition.second(predicted, mixed) @ teacher.mT)
        agreement = mixed.mul_(predicted).sum(dim=-1)
        return weight * temperature ** 2 * (value - agreement), residual, pull


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == 'mps' else torch.float64  # MPS has no float64


class FusedLossFunction(torch.autograd.Function):
    """The gradient is complete after the forward pass; the backward pass only scales it."""

    @staticmethod
    def forward(ctx, logits, source, target, teacher, make_weights, loss):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        with torch.autocast(device_type=logits.device.type, enabled=False):
            weights = make_weights(source, dtype, ctx.needs_input_grad[1])
            value, grad = loss.evaluate(logits, target.to(dtype), teacher, weights, dtype)
        ctx.save_for_backward(grad, weights.grad)
        ctx.dtypes = logits.dtype, source.dtype if source is not None else None
        return value

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'MultiMix losses can be differentiated once: no create_graph=True, and no second-order optimizer.')
        grads = (
            # Scaled before it is cast: a float16 gradient would underflow ahead of the loss scaler's factor.
            (grad * grad_output).to(dtype) if grad is not None else None
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None
