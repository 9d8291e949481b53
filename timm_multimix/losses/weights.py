"""Interpolation weights of the mixes.

Notation as in docs/method.md: `b` examples in the mini-batch, `n` mixes, `m` examples in a mix, `r` positions of the
feature map. Every row of weights is on the simplex.
"""
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch

Alpha = float | Sequence[float]


def alpha_range(alpha: Alpha | None, tuple_length: int) -> tuple[float, float]:
    """Return the range (low, high) of concentrations. None is 1 / tuple_length.

    With 1 / tuple_length the weights of a long mix approximate a Dirichlet process of concentration 1, independent of
    the length. On average the largest weight is 0.62 and the sum of squares is 1/2, as for two equal weights.
    """
    if alpha is None:
        alpha = 1 / tuple_length
    values = tuple(alpha) if isinstance(alpha, Sequence) else (alpha, alpha)
    are_numbers = len(values) in (1, 2) and all(isinstance(a, Real) and 0 < a < math.inf for a in values)
    if not are_numbers or values[0] > values[-1]:
        raise ValueError(
            f'alpha must be a positive number or a pair (low, high) with 0 < low <= high, got {alpha!r}.')
    return float(values[0]), float(values[-1])


def is_eager_cpu(device: torch.device) -> bool:
    """Return whether values can be read without synchronizing a device or breaking a compiled graph."""
    return device.type == 'cpu' and not torch.compiler.is_compiling()


def _random_options(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the keyword argument of random functions. They do not compile for dynamic shapes with generator=None."""
    return {} if generator is None else dict(generator=generator)


def _log_uniform(size: torch.Size, options: dict[str, Any]) -> torch.Tensor:
    """Draw log(1 - U) for U uniform on [0, 1). The values are finite."""
    return torch.rand(size, **options).neg_().add_(1).log_()


def _draw_log_gamma(a: torch.Tensor, size: torch.Size, generator: torch.Generator | None) -> torch.Tensor:
    """Draw logarithms of Gamma(a) variables with PyTorch's sampler.

    A Gamma(a) variable is Gamma(a + 1) * U^(1/a). The product is computed in log space, since for small a all
    variables of a row can underflow.
    """
    options = _random_options(generator)
    log_gamma = torch._standard_gamma((a + 1).expand(size), **options).log_()
    return log_gamma.add_(_log_uniform(size, dict(options, dtype=a.dtype, device=a.device)).div_(a))


def _propose_log_gamma(
        a: torch.Tensor,
        size: torch.Size,
        generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Propose logarithms of Gamma(a) variables, and return them with the flat indices of rejected proposals.

    Gamma(a + 1) variables are proposed as by Marsaglia and Tsang (ACM TOMS 2000). Given acceptance, the ratio of the
    uniform variable of their test to its bound is uniform and independent of the proposal. It is used as the U of
    _draw_log_gamma.
    """
    d = a + (1 - 1 / 3)
    options = dict(_random_options(generator), dtype=a.dtype, device=a.device)
    normal = torch.randn(size, **options)
    root = (normal * (9 * d).rsqrt()).add_(1)
    v = root.pow(3)
    log_v = root.log_().mul_(3)  # NaN if v is negative
    log_uniform = _log_uniform(size, options)
    # Subtract the bound of the acceptance test, d (1 - v + log v) + normal² / 2.
    log_uniform.addcmul_(v.sub_(log_v).sub_(1), d).addcmul_(normal, normal, value=-0.5)
    rejected = log_uniform.clamp(min=0).flatten().nonzero().squeeze(1)  # includes NaN
    return log_v.addcdiv_(log_uniform, a).add_(d.log()), rejected


def _sample_log_gamma(a: torch.Tensor, size: torch.Size, generator: torch.Generator | None) -> torch.Tensor:
    """Draw logarithms of Gamma(a) variables, for concentrations a (..., 1) and size (..., m).

    On the CPU, PyTorch's sampler draws variables one at a time, which is slow (docs/speed.md). There all variables are
    proposed with vectorized operations, and PyTorch's sampler draws only the rejected ones.
    """
    if not is_eager_cpu(a.device):
        return _draw_log_gamma(a, size, generator)
    log_gamma, rejected = _propose_log_gamma(a, size, generator)
    log_gamma.view(-1)[rejected] = _draw_log_gamma(a.flatten()[rejected // size[-1]], rejected.shape, generator)
    return log_gamma


def check_count(name: str, value: int | None) -> None:
    if value is None:
        return
    if not isinstance(value, Integral):
        raise ValueError(f'{name} must be a whole number, got {value!r}.')
    if value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}.')


def check_mask(mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the mask of valid positions (b, r) as a boolean tensor. Integers, as in an attention_mask, are cast."""
    if mask.shape != shape or mask.is_floating_point():
        raise ValueError(
            f'mask must be boolean with shape (b, r) = {tuple(shape)}, True for valid positions, got {mask.dtype} with '
            f'shape {tuple(mask.shape)}.')
    return mask.bool()


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

    For each row, the concentration is drawn uniformly from the range of alpha. The weights of `tuple_length` examples,
    chosen without replacement, are drawn from the symmetric Dirichlet distribution. The other weights are zero.

    Args:
        num_mixes: Number of rows n.
        batch_size: Number of examples b.
        num_positions: Number of positions r for which rows are drawn. None draws one set of rows, for pooled MultiMix
            or for all positions.
        alpha: Dirichlet concentration, a number or a (low, high) pair, (0.5, 2.0) in the papers. None is
            1 / tuple_length (see docs/method.md).
        tuple_length: Number of examples m in a mix, None for all b.
        generator: Random number generator.
        device: Device of the weights, by default the device of the generator, or PyTorch's default device.

    Returns:
        float32 weights (n, b), or (r, n, b) with num_positions. Rows are non-negative and sum to 1.

    Raises:
        ValueError: If a size is below 1, alpha is not positive, or the tuple is longer than the batch.
    """
    for name, size in (('num_mixes', num_mixes), ('batch_size', batch_size), ('num_positions', num_positions)):
        check_count(name, size)
    length = batch_size if tuple_length is None else tuple_length
    if not 1 <= length <= batch_size:
        raise ValueError(
            f'tuple_length must be between 1 and the batch size {batch_size}, got {length}. Use a larger batch, a '
            'shorter tuple, or None for the whole batch.')
    low, high = alpha_range(alpha, length)
    if device is None and generator is not None:
        device = generator.device

    rows = (num_mixes,) if num_positions is None else (num_positions, num_mixes)
    options: dict[str, Any] = dict(dtype=torch.float32, device=device)
    random = options | _random_options(generator)
    concentration = torch.full((*rows, 1), low, **options)
    if high > low:
        concentration += (high - low) * torch.rand((*rows, 1), **random)
    weights = _sample_log_gamma(concentration, torch.Size((*rows, length)), generator).softmax(dim=-1)
    if length == batch_size:
        return weights
    examples = torch.rand((*rows, batch_size), **random).topk(length, sorted=False).indices
    return torch.zeros((*rows, batch_size), **options).scatter_(-1, examples, weights)


def manifold_mixup_weights(
        batch_size: int,
        *,
        alpha: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw weights for which MultiMix is manifold mixup at the last layer (Verma et al., ICML 2019).

    Row i mixes example i with its partner in a random permutation. λ ~ Beta(alpha, alpha) is drawn once for the batch.

    Args:
        batch_size: Number of examples b, which is also the number of rows n.
        alpha: Parameter of the Beta distribution.
        generator: Random number generator.
        device: Device of the weights, by default the device of the generator, or PyTorch's default device.

    Returns:
        float32 weights (b, b), for `multimix_cross_entropy`.
    """
    lam = sample_weights(1, 2, alpha=alpha, generator=generator, device=device)[0, 0]
    partners = torch.randperm(batch_size, generator=generator, device=lam.device)
    identity = torch.eye(batch_size, dtype=lam.dtype, device=lam.device)
    return lam * identity + (1 - lam) * identity[partners]


def attended_rows(weights: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attended weights (r, n, b), and 1 for every row with attention and 0 for the others (r, n, 1).

    Rows without attention are zero. A boolean attention keeps the sums of the weights, and thus weights that it does
    not change.
    """
    scaled = weights * attention.mT.contiguous().unsqueeze(1)
    total = scaled.sum(dim=-1, keepdim=True)
    if attention.dtype == torch.bool:
        total = total / weights.sum(dim=-1, keepdim=True)
    empty = total == 0
    return scaled / total.masked_fill(empty, torch.inf), (~empty).to(weights.dtype)


def attend(weights: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scale the weights at every position by the attention and normalize them (P2, eqs. 10-11).

    Column i at position j is multiplied by the attention of example i at position j. Each row is divided by its sum. If
    all examples of a row have zero attention at a position, the row is not changed.

    Args:
        weights: Interpolation weights (n, b), shared by all positions, or (r, n, b).
        attention: Attention (b, r), non-negative.
        mask: Valid positions (b, r), True for valid. The weights of padding are zero. A row is zero at a position if
            all its examples have padding there.

    Returns:
        Weights (r, n, b), rows on the simplex, or zero with a mask.

    Raises:
        ValueError: If the shapes do not match.
    """
    if attention.ndim != 2 or weights.ndim not in (2, 3) or weights.shape[-1] != attention.shape[0] or (
            weights.ndim == 3 and weights.shape[0] != attention.shape[1]):
        raise ValueError(
            'attend expects weights (n, b) or (r, n, b) and attention (b, r), '
            f'got weights {tuple(weights.shape)} and attention {tuple(attention.shape)}.')
    unattended = weights
    if mask is not None:
        mask = check_mask(mask, attention.shape)
        attention = attention.masked_fill(~mask, 0)
        unattended, _ = attended_rows(weights, mask)
    attended, rows = attended_rows(weights, attention)
    return attended.addcmul_(unattended, 1 - rows)
