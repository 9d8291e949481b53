"""One pass over the mixes: value and gradient of MultiMix losses, tile by tile.

MultiMix is a loss on logits: the classifier is affine and every row of weights sums to 1, so mixing embeddings and then
classifying them is mixing their logits. Written with the log-partition A of the loss (logsumexp for cross-entropy,
softplus for binary cross-entropy), the loss of n mixes at one position is

    mean_k A(M_k L) - <(MᵀM / n) Y, L>,    its gradient for L:    Mᵀ A'(M L) / n - (MᵀM / n) Y.

Only A needs the mixed logits M L. They are formed tile by tile, value and gradient in the same pass, so nothing of size
n x c is kept, and the weights themselves can be drawn block by block. docs/method.md has the derivation.

With w and K the mean and the covariance of the rows of M, MᵀM / n is K + w wᵀ, and the gradient falls apart into what
moves all examples together, w times the sum of its rows, and what tells them apart, which balancing multiplies.

A teacher adds a term A(M_k L) - A'(M_k L')·M_k L, whose targets are its own predictions A' of the same mixes of its
logits L'. They exist tile by tile too, and share the student's tiles.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .balance import RowMoments, kappa
from .weights import attend

# Elements of a tile of mixed logits, and of a block of freshly drawn weights. On the CPU a tile should fit a core's
# cache, and has several positions only if they are small; a GPU wants many at a time. Blocks do not follow tiles:
# weights are drawn a block at a time, and the result may not depend on how the work is tiled. They are larger than what
# is fastest to draw, because drawing and mixing push each other out of the cache.
TILE_ELEMENTS = {'cpu': 2 ** 19}
MANY_POSITIONS = {'cpu': 2 ** 16}
BLOCK_ELEMENTS = {'cpu': 2 ** 19}
ON_A_GPU = 2 ** 24
MIN_ROWS = 64


class Partition(NamedTuple):
    """The log-partition A of a loss A(l) - y·l; its derivative A' is what the model predicts from l.

    Attributes:
        derivative: Takes mixed logits (p, t, c); returns A' of that shape.
        value: Takes mixed logits and their A'; returns A of every row (p, t).
        second: Takes A' and a direction of that shape; returns A'' times the direction.
        scales_with_target: Whether A is multiplied by the sum of the row's target, as logsumexp is in cross-entropy.
    """
    derivative: Callable[[torch.Tensor], torch.Tensor]
    value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    second: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    scales_with_target: bool


def _logsumexp(mixed: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    # The largest probability is exp(largest logit - logsumexp), which cannot underflow.
    return mixed.amax(dim=-1) - probabilities.amax(dim=-1).log_()


SOFTMAX = Partition(
    derivative=lambda mixed: mixed.softmax(dim=-1),
    value=_logsumexp,
    second=lambda q, direction: q * (direction - (q * direction).sum(dim=-1, keepdim=True)),
    scales_with_target=True,
)
SIGMOID = Partition(
    derivative=torch.sigmoid,
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
    """Weights drawn a block at a time, when they are needed, and attended with attention (b, r) or not at all.

    With `num_shared` mixes they are drawn at once, for all positions.
    """

    def __init__(
            self,
            attention: torch.Tensor | None,
            dtype: torch.dtype,
            needs_grad: bool,
            *,
            sample: Callable[..., torch.Tensor],
            num_shared: int | None = None,
    ):
        self.sample = sample
        self.shared = sample(num_shared).to(dtype) if num_shared is not None else None
        self.dtype = dtype
        self.attention = attention.to(dtype) if attention is not None else None
        self.grad = torch.zeros_like(self.attention) if needs_grad else None

    def block(self, positions: slice, rows: slice) -> torch.Tensor:
        num_positions = positions.stop - positions.start
        if self.shared is None:
            weights = self.sample(rows.stop - rows.start, num_positions=num_positions).to(self.dtype)
        else:
            weights = self.shared[rows]  # attend knows weights that positions share
        if self.attention is None:
            return weights.expand(num_positions, -1, -1).contiguous()
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


def _at(tensor: torch.Tensor | None, positions: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[positions]


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class Anchor(NamedTuple):
    """What A' is near in every row of a block of positions: its values at the mean of the rows.

    Rows of M differ a lot and what is predicted from them little. Were Mᵀ A' formed as it is by products that round,
    its covariance, which balancing multiplies, would be lost in the rounding; of A' less the anchor it is not.

    Attributes:
        classified: A' (p, 1, c), for the classification term.
        distilled: The gradient of the distillation term (p, 1, c); None without a teacher.
    """
    classified: torch.Tensor
    distilled: torch.Tensor | None


@dataclass(frozen=True)
class FusedLoss:
    """The loss of `num_mixes` mixes at every position, summed over classes; value and gradients in one pass."""
    partition: Partition
    num_mixes: int
    balance: bool = True
    logit_scale: float = 1.0
    tile_size: int | None = None
    distillation: Distillation | None = None

    def block_shape(self, logits: torch.Tensor) -> tuple[int, int]:
        """Positions and rows of a block of weights: functions of the problem only, not of the tile size."""
        batch_size, num_positions, num_classes = logits.shape
        elements = BLOCK_ELEMENTS.get(logits.device.type, ON_A_GPU)
        rows = min(self.num_mixes, max(MIN_ROWS, elements // batch_size))
        positions = min(elements // (rows * batch_size), 2 * elements // (batch_size * num_classes))
        return min(num_positions, max(1, positions)), rows

    def tile_shape(self, m: torch.Tensor, num_classes: int) -> tuple[int, int]:
        """Positions and rows of a tile of the mixed logits of a block of weights."""
        num_positions, num_rows, _ = m.shape
        most = self.tile_size or max(MIN_ROWS, TILE_ELEMENTS.get(m.device.type, ON_A_GPU) // num_classes)
        num_tiles = -(-num_rows // most)
        rows = min(num_rows, self.tile_size or -(-num_rows // num_tiles))
        positions = MANY_POSITIONS.get(m.device.type, ON_A_GPU) // (rows * num_classes)
        return min(num_positions, max(1, positions)), rows

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
        block_positions, block_rows = self.block_shape(logits)
        grad = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        loss = torch.zeros((), dtype=_sum_dtype(logits), device=logits.device)
        teacher_block = None
        if teacher is not None:
            teacher = teacher.expand(logits.shape)
            target = target * (1 - self.distillation.weight)
        for positions in _slices(logits.shape[1], block_positions):
            block = _block(logits, positions, dtype, self.logit_scale)
            if teacher is not None:
                teacher_block = _block(
                    teacher, positions, dtype, self.logit_scale / self.distillation.temperature)
            block_loss, block_grad = self._evaluate_block(block, target, teacher_block, weights, positions, block_rows)
            loss += block_loss
            grad[:, positions] = block_grad.transpose(0, 1)
        num_positions = logits.shape[1]
        if weights.grad is not None:
            weights.grad /= self.num_mixes * num_positions
        return (loss / num_positions).to(dtype), grad.mul_(self.logit_scale / num_positions)

    def _evaluate_block(
            self,
            logits: torch.Tensor,
            target: torch.Tensor,
            teacher: torch.Tensor | None,
            weights: Weights,
            positions: slice,
            block_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient, means over rows, of a block of positions: logits, teacher (p, b, c), target (b, c)."""
        mass = target.sum(dim=1) if self.partition.scales_with_target else None
        slope = torch.zeros_like(logits)
        loss = logits.new_zeros((), dtype=_sum_dtype(logits))
        moments = anchor = None
        for rows in _slices(self.num_mixes, block_rows):
            m = weights.block(positions, rows)
            if moments is None:
                moments = RowMoments(m)
                anchor = None if are_exact(m.device) else self._anchor(moments.shift, logits, mass, teacher)
            moments.add(m)
            m_grad = torch.empty_like(m) if weights.grad is not None else None
            loss += self._evaluate_rows(m, logits, target, mass, teacher, anchor, slope, m_grad)
            if m_grad is not None:
                weights.backward(positions, rows, m_grad)
        w, covariance = moments.mean(), moments.covariance()
        slope /= self.num_mixes
        mixed_target = w.mT @ target
        covariant_target = covariance @ target
        agreement = (covariant_target * logits).sum(dtype=loss.dtype)
        agreement += ((w * logits).sum(dim=1, keepdim=True) * mixed_target).sum(dtype=loss.dtype)
        summed = slope.sum(dim=1, keepdim=True)
        apart = slope.addcmul_(w, summed, value=-1).sub_(covariant_target)
        together = summed - mixed_target
        if anchor is not None:  # give back what was taken from A'
            if mass is None:
                together += anchor.classified * self._share(teacher)
            else:
                together += anchor.classified * (w.mT @ mass).unsqueeze(-1)
                apart += (covariance @ mass).unsqueeze(-1) * anchor.classified
            if anchor.distilled is not None:
                together += anchor.distilled
        factor = kappa(w, covariance) if self.balance else 1
        return loss / self.num_mixes - agreement, apart.mul_(factor).addcmul_(w, together)

    def _share(self, teacher: torch.Tensor | None) -> float:
        """Share of classification in the loss."""
        return 1.0 if teacher is None else 1 - self.distillation.weight

    def _anchor(
            self,
            mean_row: torch.Tensor,
            logits: torch.Tensor,
            mass: torch.Tensor | None,
            teacher: torch.Tensor | None,
    ) -> Anchor:
        mixed = torch.bmm(mean_row, logits)
        derivative = self.partition.derivative(mixed)
        if teacher is None:
            return Anchor(derivative, None)
        value = self.partition.value(mixed, derivative)
        _, distilled, _ = self._distill(mean_row, mixed, derivative, value, teacher, False)
        return Anchor(derivative, distilled)

    def _evaluate_rows(
            self,
            m: torch.Tensor,
            logits: torch.Tensor,
            target: torch.Tensor,
            mass: torch.Tensor | None,
            teacher: torch.Tensor | None,
            anchor: Anchor | None,
            slope: torch.Tensor,
            m_grad: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add Mᵀ A' to slope (p, b, c), less the anchor, and fill m_grad (p, t, b), tile by tile.

        Returns:
            The sum of the loss over rows and positions. Of the classification term this is A's part: what is linear in
            the target comes from the covariance.
        """
        total = logits.new_zeros((), dtype=_sum_dtype(logits))
        tile_positions, tile_rows = self.tile_shape(m, logits.shape[-1])
        agreement = target @ logits.mT if m_grad is not None else None
        for at in _slices(len(m), tile_positions):
            for rows in _slices(m.shape[1], tile_rows):
                total += self._evaluate_tile(
                    m[at, rows],
                    logits[at],
                    mass,
                    _at(teacher, at),
                    Anchor(*(_at(tensor, at) for tensor in anchor)) if anchor is not None else None,
                    slope[at],
                    agreement[at] + agreement[at].mT if agreement is not None else None,
                    m_grad[at, rows] if m_grad is not None else None,
                )
        return total

    def _evaluate_tile(
            self,
            tile: torch.Tensor,
            logits: torch.Tensor,
            mass: torch.Tensor | None,
            teacher: torch.Tensor | None,
            anchor: Anchor | None,
            slope: torch.Tensor,
            agreement: torch.Tensor | None,
            m_grad: torch.Tensor | None,
    ) -> torch.Tensor:
        """_evaluate_rows of one tile; agreement is Y Lᵀ + L Yᵀ."""
        mixed = torch.bmm(tile, logits)
        derivative = self.partition.derivative(mixed)
        value = self.partition.value(mixed, derivative)
        share = self._share(teacher) if mass is None else (tile @ mass).unsqueeze(-1)
        loss = value * (share if mass is None else share.squeeze(-1))
        pull = None
        if teacher is not None:
            term, distilled, pull = self._distill(tile, mixed, derivative, value, teacher, m_grad is not None)
            loss += term
        if m_grad is not None:
            whole = derivative * share if teacher is None else distilled + derivative * share
            m_grad.copy_(self._gradient_of_rows(tile, logits, agreement, mass, value, whole, pull))
        if anchor is not None:
            derivative = derivative.sub_(anchor.classified)
        if teacher is None:
            slope += torch.bmm((tile * share).mT, derivative)
        else:
            if anchor is not None:
                distilled.sub_(anchor.distilled)
            slope += torch.bmm(tile.mT, distilled.add_(derivative.mul_(share)))
        return loss.sum(dtype=_sum_dtype(loss))

    def _gradient_of_rows(
            self,
            tile: torch.Tensor,
            logits: torch.Tensor,
            agreement: torch.Tensor,
            mass: torch.Tensor | None,
            value: torch.Tensor,
            derivative: torch.Tensor,
            pull: torch.Tensor | None,
    ) -> torch.Tensor:
        """Gradient of the loss for the rows of a tile (p, t, b), derivative being that for the mixed logits."""
        grad = derivative @ logits.mT - tile @ agreement
        if pull is not None:
            grad -= pull
        if mass is not None:
            grad += value.unsqueeze(-1) * mass
        return grad

    def _distill(
            self,
            tile: torch.Tensor,
            mixed: torch.Tensor,
            derivative: torch.Tensor,
            value: torch.Tensor,
            teacher: torch.Tensor,
            needs_pull: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The distillation term of a tile, A(l/T) - q·l/T with the teacher's predictions q of the same mixes.

        Args:
            tile: Rows of M (p, t, b).
            mixed: The student's mixed logits l (p, t, c); overwritten.
            derivative: Their A'.
            value: Their A.
            teacher: The teacher's logits, divided by the temperature T (p, b, c).
            needs_pull: Whether to return what the rows of M do to q.

        Returns:
            The term of every row (p, t); its gradient for the mixed logits (p, t, c); and the part of its gradient
            for M that comes through q, negative (p, t, b), or None. All weighted.
        """
        weight, temperature = self.distillation
        predicted = self.partition.derivative(torch.bmm(tile, teacher))
        if temperature != 1:
            # the student at this temperature is another distribution than the one that classifies
            mixed = mixed.div_(temperature)
            derivative = self.partition.derivative(mixed)
            value = self.partition.value(mixed, derivative)
        residual = (derivative - predicted).mul_(weight * temperature)
        pull = None
        if needs_pull:
            pull = weight * temperature ** 2 * (self.partition.second(predicted, mixed) @ teacher.mT)
        agreement = mixed.mul_(predicted).sum(dim=-1)
        return weight * temperature ** 2 * (value - agreement), residual, pull


def are_exact(device: torch.device) -> bool:
    """Whether products of float32 keep its precision. On other devices they may round operands to TF32 or bfloat16.

    Compiled code cannot ask.
    """
    is_eager = not torch.compiler.is_compiling()
    return is_eager and device.type == 'cpu' and torch.get_float32_matmul_precision() == 'highest'


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
