"""Interpolation weights: which examples enter each mix, and how much of each.

Notation follows docs/method.md: `b` examples in the mini-batch, `n` interpolated examples made from it, tuples of `m`
examples, `r` positions of the feature map. Every row of weights lies on the simplex.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch

Alpha = float | Sequence[float]


def alpha_range(alpha: Alpha | None, tuple_length: int) -> tuple[float, float]:
    """Return the range `(low, high)` that concentrations are drawn from; a single number is a range of one value.

    None is 1 / tuple_length: for long tuples the weights of a mix are then those of a Dirichlet process of
    concentration 1, whatever the length. The largest is 0.62 on average, the sum of squares 1/2, as of an even pair.

    Raises:
        ValueError: if alpha is neither None, a positive number nor an ascending pair of positive numbers.
    """
    if alpha is None:
        alpha = 1 / tuple_length
    values = tuple(alpha) if isinstance(alpha, Sequence) else (alpha, alpha)
    ok = len(values) in (1, 2) and all(isinstance(a, (int, float)) and 0 < a < math.inf for a in values)
    if not ok or values[0] > values[-1]:
        raise ValueError(
            'alpha must be a positive number, a pair (low, high) with 0 < low <= high, or None for '
            f'1 / (examples in a mix), got {alpha!r}.')
    return float(values[0]), float(values[-1])


def check_tuple_length(tuple_length: int | None, batch_size: int) -> int:
    """Return the number of examples in a mix; None stands for the whole mini-batch.

    Raises:
        ValueError: if the tuple does not fit the mini-batch.
    """
    if tuple_length is None:
        return batch_size
    if not 1 <= tuple_length <= batch_size:
        raise ValueError(
            f'tuple_length must lie between 1 and the batch size {batch_size}, got {tuple_length}. '
            'Use a larger batch, a shorter tuple, or None for the whole batch.')
    return tuple_length


def _can_draw_again(device: torch.device) -> bool:
    """Whether the number of rejected draws may be read: it would synchronise a GPU, and break a compiled graph."""
    return device.type == 'cpu' and not torch.compiler.is_compiling()


def _log_uniform(size: torch.Size, options: dict[str, Any]) -> torch.Tensor:
    """Logarithms of 1 - U, U uniform on [0, 1). They are finite."""
    return torch.rand(size, **options).neg_().add_(1).log_()


def _draw_log_gamma(a: torch.Tensor, size: torch.Size, generator: torch.Generator | None) -> torch.Tensor:
    """Draw logarithms of Gamma(a) variables with PyTorch's sampler.

    A Gamma(a) variable is Gamma(a + 1) * U^(1/a). The product is formed in log space: for the smallest a, all Gamma(a)
    variables of a row may underflow, and their ratios would be 0/0.
    """
    log_gamma = torch._standard_gamma((a + 1).expand(size), generator=generator).log_()
    return log_gamma.add_(_log_uniform(size, dict(dtype=a.dtype, device=a.device, generator=generator)).div_(a))


def _propose_log_gamma(
        a: torch.Tensor,
        size: torch.Size,
        generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Propose logarithms of Gamma(a) variables, and return the flat indices of the rejected ones.

    The proposals for Gamma(a + 1) are those of Marsaglia and Tsang (ACM TOMS 2000). Given acceptance, the ratio of the
    test's uniform variable to its bound is uniform and independent of the proposal. It is the U of _draw_log_gamma.
    """
    d = a + (1 - 1 / 3)
    options = dict(dtype=a.dtype, device=a.device, generator=generator)
    normal = torch.randn(size, **options)
    root = (normal * (9 * d).rsqrt()).add_(1)
    v = root.pow(3)
    log_v = root.log_().mul_(3)  # NaN if v is negative
    log_uniform = _log_uniform(size, options)
    # Minus the bound of its test, d (1 - v + log v) + normal² / 2.
    log_uniform.addcmul_(v.sub_(log_v).sub_(1), d).addcmul_(normal, normal, value=-0.5)
    rejected = log_uniform.clamp(min=0).flatten().nonzero().squeeze(1)  # includes NaN
    return log_v.addcdiv_(log_uniform, a).add_(d.log()), rejected


def _sample_log_gamma(a: torch.Tensor, size: torch.Size, generator: torch.Generator | None) -> torch.Tensor:
    """Draw logarithms of Gamma(a) variables, for concentrations a (..., 1) and size (..., m).

    On a CPU PyTorch's sampler draws one variable at a time, which takes a large part of the loss (docs/speed.md). So
    all variables are proposed at once, and PyTorch's sampler draws only the rejected ones.
    """
    if not _can_draw_again(a.device):
        return _draw_log_gamma(a, size, generator)
    log_gamma, rejected = _propose_log_gamma(a, size, generator)
    log_gamma.view(-1)[rejected] = _draw_log_gamma(a.flatten()[rejected // size[-1]], rejected.shape, generator)
    return log_gamma


def _sample_dirichlet(concentration: torch.Tensor, length: int, generator: torch.Generator | None) -> torch.Tensor:
    """Draw symmetric Dirichlet rows (..., length), of concentration (..., 1)."""
    size = torch.Size((*concentration.shape[:-1], length))
    return _sample_log_gamma(concentration, size, generator).softmax(dim=-1)


def sample_weights(
        num_mixes: int,
        batch_size: int,
        num_positions: int | None = None,
        *,
        alpha: Alpha | None = None,
        tuple_length: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw interpolation weights (P2, sec. 3.2, eqs. 6-7; per position sec. 3.3, eq. 10).

    Each row draws its own concentration uniformly between the two alphas, then its weights from the symmetric Dirichlet
    of that concentration over `tuple_length` distinct examples, chosen without replacement; the rest are zero.

    Args:
        num_mixes: Number of rows n.
        batch_size: Number of examples b.
        num_positions: Number of positions r, each with rows of its own; None for pooled MultiMix.
        alpha: Dirichlet concentration, a number or a (low, high) pair, (0.5, 2.0) in the papers; None for
            1 / tuple_length (docs/method.md says why).
        tuple_length: Number of examples m in a mix, None for all b.
        generator: Source of randomness; the same seed gives the same weights.
        device: Device of the weights, by default that of the generator, else PyTorch's default.

    Returns:
        float32 weights (n, b), or (r, n, b) with num_positions. Rows are non-negative and sum to 1.

    Raises:
        ValueError: if a size is below 1, alpha is not positive, or the tuple is longer than the batch.
    """
    for name, size in (('num_mixes', num_mixes), ('batch_size', batch_size), ('num_positions', num_positions)):
        if size is not None and size < 1:
            raise ValueError(f'{name} must be at least 1, got {size}.')
    length = check_tuple_length(tuple_length, batch_size)
    low, high = alpha_range(alpha, length)
    if device is None and generator is not None:
        device = generator.device

    rows = (num_mixes,) if num_positions is None else (num_positions, num_mixes)
    options = dict(dtype=torch.float32, device=device)
    concentration = torch.full((*rows, 1), low, **options)
    if high > low:
        concentration += (high - low) * torch.rand((*rows, 1), generator=generator, **options)
    weights = _sample_dirichlet(concentration, length, generator)
    if length == batch_size:
        return weights
    examples = torch.rand((*rows, batch_size), generator=generator, **options).topk(length, sorted=False).indices
    return torch.zeros((*rows, batch_size), **options).scatter_(-1, examples, weights)


def manifold_mixup_weights(
        batch_size: int,
        *,
        alpha: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
) -> torch.Tensor:
    """Weights that turn MultiMix into manifold mixup at the last layer: n = b pairs that share one λ.

    Row i mixes example i with its partner under a random permutation, λ ~ Beta(alpha, alpha) drawn once for the batch
    (Verma et al., Manifold Mixup, ICML 2019).

    Returns:
        float32 weights (b, b), for `multimix_cross_entropy`.
    """
    lam = sample_weights(1, 2, alpha=alpha, generator=generator, device=device)[0, 0]
    partners = torch.randperm(batch_size, generator=generator, device=lam.device)
    identity = torch.eye(batch_size, device=lam.device)
    return lam * identity + (1 - lam) * identity[partners]


def attend(weights: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Weight each position's mixes by how much that position shows of each example (P2, eqs. 10-11).

    Column i at position j is scaled by the attention of example i there, and each row divided by its sum. A row whose
    examples all have zero attention at a position keeps its unattended weights.

    Args:
        weights: Interpolation weights (n, b), shared by all positions, or (r, n, b).
        attention: Attention (b, r), non-negative.

    Returns:
        Weights (r, n, b), rows on the simplex.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    if attention.ndim != 2 or weights.ndim not in (2, 3) or weights.shape[-1] != attention.shape[0] or (
            weights.ndim == 3 and weights.shape[0] != attention.shape[1]):
        raise ValueError(
            'attend takes weights (n, b) or (r, n, b) and attention (b, r), '
            f'got weights {tuple(weights.shape)} and attention {tuple(attention.shape)}.')
    scaled = weights * attention.mT.contiguous().unsqueeze(1)
    total = scaled.sum(dim=-1, keepdim=True)
    empty = total == 0
    # Rows without attention become 0 and get their weights back: on a CPU faster than torch.where.
    return (scaled / total.masked_fill(empty, torch.inf)).addcmul_(weights, empty.to(weights.dtype))
