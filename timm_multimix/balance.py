"""Gradient balancing: what the rows of weights are like on average, and the gradient that follows (docs/method.md)."""
import torch


class RowMoments:
    """Mean w and covariance of the rows of weights M at every position, gathered a block of rows at a time.

    Balancing multiplies C, the part of the gradient that tells examples apart, by κ, which may be some hundred. C is
    linear in the covariance. Had as MᵀM/n - w wᵀ, a small difference of large numbers, it would carry their rounding:
    so rows are centred first, on the mean of the first block.
    """

    def __init__(self, m: torch.Tensor):
        self.shift = m.mean(dim=1, keepdim=True)
        self.deviation = torch.zeros_like(self.shift)
        self.scatter = m.new_zeros(len(m), m.shape[-1], m.shape[-1])
        self.num_rows = 0

    def add(self, m: torch.Tensor) -> None:
        """Take in a block of rows (p, t, b)."""
        centred = m - self.shift
        self.deviation += centred.sum(dim=1, keepdim=True)
        self.scatter.baddbmm_(centred.mT, centred)
        self.num_rows += m.shape[1]

    def mean(self) -> torch.Tensor:
        """w as a column (p, b, 1)."""
        return (self.shift + self.deviation / self.num_rows).mT

    def covariance(self) -> torch.Tensor:
        """MᵀM/n - w wᵀ (p, b, b)."""
        deviation = self.deviation / self.num_rows
        return self.scatter / self.num_rows - deviation.mT * deviation


def kappa(w: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Factor of C in the balanced gradient, at every position (p, 1, 1).

    Args:
        w: Mean of the rows (p, b, 1).
        covariance: Covariance of the rows (p, b, b); its trace is S - Σw², S the mean of the rows' sums of squares.
    """
    w_square = w.square().sum(dim=(1, 2))
    spread = covariance.diagonal(dim1=1, dim2=2).sum(dim=-1)
    # Where all rows are alike, C is zero and κ undefined.
    alike = spread <= 8 * torch.finfo(w.dtype).eps * (spread + w_square)
    return torch.where(alike, 1, (1 - w_square) / spread.masked_fill(alike, 1))[:, None, None]
