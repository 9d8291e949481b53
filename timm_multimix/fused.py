"""One pass over the mixes: value and gradient of MultiMix losses, tile by tile.

MultiMix is a loss on logits: the classifier is affine and every row of weights sums to 1, so mixing embeddings and then
classifying them is mixing their logits. Written with the log-partition A of the loss (logsumexp for cross-entropy,
softplus for binary cross-entropy), the loss of n mixes at one position is

    mean_k A(M_k L) - <(MᵀM / n) Y, L>,    its gradient for L:    Mᵀ A'(M L) / n - (MᵀM / n) Y.

Only A needs the mixed logits M L. They are formed tile by tile, value and gradient in the same pass, so nothing of size
n x c is kept, and the weights themselves can be drawn block by block. docs/method.md has the derivation.
"""
from collections.abc import Callable, Iterator
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
    """The log-partition A of a loss A(l) - y·l.

    Attributes:
        evaluate: Takes mixed logits (p, t, c) and scratch of that shape; returns A of every row (p, t) and A' of every
            element (p, t, c). May overwrite both.
        scales_with_target: Whether A is multiplied by the sum of the row's target, as logsumexp is in cross-entropy.
    """
    evaluate: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    scales_with_target: bool


def _logsumexp(mixed: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    torch.softmax(mixed, dim=-1, out=scratch)
    # The largest probability is exp(largest logit - logsumexp), which cannot underflow.
    return mixed.amax(dim=-1) - scratch.amax(dim=-1).log_(), scratch


def _softplus(mixed: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    torch.sigmoid(mixed, out=scratch)
    return F.softplus(mixed).sum(dim=-1), scratch


SOFTMAX = Partition(_logsumexp, scales_with_target=True)
SIGMOID = Partition(_softplus, scales_with_target=False)


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
            weights: Weights,
            dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and its gradient for logits (b, r, c). Leaves the gradient of the weights in `weights`."""
        batch_size, num_positions, num_classes = logits.shape
        block_positions, block_rows = self.block_shape(num_positions, batch_size, num_classes)
        grad = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        loss = torch.zeros((), dtype=_sum_dtype(logits), device=logits.device)
        for positions in _slices(num_positions, block_positions):
            block = logits[:, positions].transpose(0, 1).to(dtype).mul(self.logit_scale).contiguous()
            block_loss, block_grad = self._evaluate_block(block, target, weights, positions, block_rows)
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
            weights: Weights,
            positions: slice,
            block_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient, summed over rows, of a block of positions: logits (p, b, c), target (b, c)."""
        slope = torch.zeros_like(logits)
        gram = logits.new_zeros(len(logits), logits.shape[1], logits.shape[1])
        loss = logits.new_zeros((), dtype=_sum_dtype(logits))
        for rows in _slices(self.num_mixes, block_rows):
            m = weights.block(positions, rows)
            gram.baddbmm_(m.mT, m)
            m_grad = torch.empty_like(m) if weights.grad is not None else None
            loss += self._evaluate_rows(m, logits, target, slope, m_grad)
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
            slope: torch.Tensor,
            m_grad: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add Mᵀ A' to slope (p, b, c) and fill m_grad (p, t, b), tile by tile; return the sum of A."""
        num_positions, num_rows, _ = m.shape
        mass = target.sum(dim=1) if self.partition.scales_with_target else None
        if m_grad is not None:
            agreement = target @ logits.mT
            agreement = agreement + agreement.mT
        tile_rows = min(num_rows, self.tile_rows(num_positions, logits.shape[-1]))
        buffers = logits.new_empty(2, num_positions, tile_rows, logits.shape[-1])
        total = logits.new_zeros((), dtype=_sum_dtype(logits))
        for rows in _slices(num_rows, tile_rows):
            tile = m[:, rows]
            mixed, scratch = buffers[:, :, :tile.shape[1]]
            torch.bmm(tile, logits, out=mixed)
            value, derivative = self.partition.evaluate(mixed, scratch)
            tile_mass = tile @ mass if mass is not None else torch.ones_like(value)
            total += (value * tile_mass).sum(dtype=total.dtype)
            slope.baddbmm_((tile * tile_mass.unsqueeze(-1)).mT, derivative)
            if m_grad is not None:
                tile_grad = (derivative @ logits.mT) * tile_mass.unsqueeze(-1) - tile @ agreement
                if mass is not None:
                    tile_grad += value.unsqueeze(-1) * mass
                m_grad[:, rows] = tile_grad
        return total


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == 'mps' else torch.float64  # MPS has no float64


class FusedLossFunction(torch.autograd.Function):
    """The gradient is complete after the forward pass; the backward pass only scales it."""

    @staticmethod
    def forward(ctx, logits, source, target, make_weights, loss):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        with torch.autocast(device_type=logits.device.type, enabled=False):
            weights = make_weights(source, dtype, ctx.needs_input_grad[1])
            value, grad = loss.evaluate(logits, target.to(dtype), weights, dtype)
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
        return *grads, None, None, None
