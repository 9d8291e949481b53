"""Geometry of the embeddings, the input of the last affine layer, on the unit sphere.

Computed in float64 on the CPU, because MPS has no float64.
"""
import math

import torch
import torch.nn.functional as F

_TILE = 1024
_MAX_PERPLEXITY = 30


def _class_moments(points: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number of points (k,), mean (k, d) and mean squared distance to the mean (k,) of each class that occurs."""
    classes, index = target.cpu().unique(return_inverse=True)
    count = torch.bincount(index, minlength=len(classes)).double()
    mean = points.new_zeros(len(classes), points.shape[1]).index_add_(0, index, points) / count[:, None]
    scatter = torch.bincount(index, weights=(points - mean[index]).square().sum(1), minlength=len(classes)) / count
    return count, mean, scatter


def alignment(embeddings: torch.Tensor, target: torch.Tensor) -> float:
    """Alignment: mean squared distance of two images of the same class (Wang & Isola, 2020, alpha = 2).

    The mean is over all pairs of different images of the same class; nan if no class has two. Lower is more aligned.
    """
    count, _, scatter = _class_moments(F.normalize(embeddings.cpu().double()), target)
    # sum of |x - y|^2 over the ordered pairs of a class is 2 n times the sum of |x - mean|^2
    pairs = (count * (count - 1)).sum()
    return ((2 * count.square() * scatter).sum() / pairs).item()


def uniformity(embeddings: torch.Tensor) -> float:
    """Uniformity: logarithm of the mean of exp(-2 |x - y|^2) over pairs of images (Wang & Isola, 2020, t = 2).

    The mean is over all pairs of different images; nan for a single image. Lower is more uniform.
    """
    points = F.normalize(embeddings.cpu().double())
    if len(points) < 2:
        return math.nan
    total = -float(len(points))  # each image with itself
    for rows in points.split(_TILE):
        for columns in points.split(_TILE):
            total += (4 * (rows @ columns.T - 1)).exp().sum().item()
    return math.log(total / (len(points) * (len(points) - 1))) if total > 0 else -math.inf


def compactness(embeddings: torch.Tensor, target: torch.Tensor) -> tuple[float, dict[int, float]]:
    """Within-class scatter over total scatter: 0 if every class is a point, 1 if all classes have the same mean.

    Scatter is the mean squared distance to the mean of the class, or to the overall mean.

    Returns:
        The ratio over all images, and for each class the scatter of its images over the total scatter.
    """
    points = F.normalize(embeddings.cpu().double())
    count, _, scatter = _class_moments(points, target)
    overall = (points - points.mean(0)).square().sum(1).mean()
    ratio = scatter / overall
    by_class = dict(zip(target.unique().tolist(), ratio.tolist(), strict=True))
    return ((count * ratio).sum() / count.sum()).item(), by_class


def project(embeddings: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Coordinates (n, 2) of t-SNE of the embeddings of four images or more, initialised with principal components."""
    from sklearn.manifold import TSNE  # slow to import

    points = F.normalize(embeddings.cpu().double()).numpy()
    if (points == points[0]).all():
        # scikit-learn would divide by their spread
        return torch.zeros(len(points), 2, dtype=torch.float64, device='cpu')
    perplexity = min(_MAX_PERPLEXITY, (len(points) - 1) / 3)
    start = 'pca' if min(points.shape) >= 2 else 'random'
    return torch.from_numpy(TSNE(init=start, perplexity=perplexity, random_state=seed).fit_transform(points)).double()
