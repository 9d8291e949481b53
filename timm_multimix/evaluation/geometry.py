"""Geometry of embeddings on the unit sphere, and predictions and embeddings of mixes of two images.

The measures are computed in float64 on the CPU, because MPS has no float64.
"""
import math

import torch
import torch.nn.functional as F

# Weights of the first image of a mix. The first and the last one give the images themselves.
SHARES = tuple(k / 10 for k in range(11))
_TILE = 1024
_MAX_PERPLEXITY = 30


def _class_moments(points: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of points (k,) of each class, and their mean squared distance (k,) to the mean of the class."""
    classes, index = target.cpu().unique(return_inverse=True)
    count = torch.bincount(index, minlength=len(classes)).double()
    mean = points.new_zeros(len(classes), points.shape[1]).index_add_(0, index, points) / count[:, None]
    return count, torch.bincount(index, weights=(points - mean[index]).square().sum(1)) / count


def alignment(embeddings: torch.Tensor, target: torch.Tensor) -> float:
    """Return the alignment: mean squared distance of two images of the same class (Wang & Isola, 2020, alpha = 2).

    The mean is over all pairs of different images of the same class; NaN if no class has two. Lower is more aligned.
    """
    count, scatter = _class_moments(F.normalize(embeddings.cpu().double()), target)
    # The sum of |x - y|^2 over the ordered pairs of a class is 2 n times the sum of |x - mean|^2.
    pairs = (count * (count - 1)).sum()
    return ((2 * count.square() * scatter).sum() / pairs).item()


def uniformity(embeddings: torch.Tensor) -> float:
    """Return the uniformity: logarithm of the mean of exp(-2 |x - y|^2) over pairs (Wang & Isola, 2020, t = 2).

    The mean is over all pairs of different images; NaN for a single image. Lower is more uniform.
    """
    points = F.normalize(embeddings.cpu().double())
    if len(points) < 2:
        return math.nan
    total = sum((4 * (rows @ points.T - 1)).exp().sum().item() for rows in points.split(_TILE))
    total -= len(points)  # each image with itself
    return math.log(total / (len(points) * (len(points) - 1))) if total > 0 else -math.inf


def compactness(embeddings: torch.Tensor, target: torch.Tensor) -> tuple[float, dict[int, float]]:
    """Return within-class scatter over total scatter: 0 if every class is a point, 1 if all classes have the same mean.

    Scatter is the mean squared distance to the mean of the class, or to the overall mean.

    Returns:
        The ratio over all images, and for each class the scatter of its images over the total scatter.
    """
    points = F.normalize(embeddings.cpu().double())
    count, scatter = _class_moments(points, target)
    ratio = scatter / (points - points.mean(0)).square().sum(1).mean()
    by_class = dict(zip(target.unique().tolist(), ratio.tolist(), strict=True))
    return ((count * ratio).sum() / count.sum()).item(), by_class


def project(embeddings: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return coordinates (n, 2) of t-SNE of four embeddings or more, initialized with principal components."""
    from sklearn.manifold import TSNE  # slow to import

    points = F.normalize(embeddings.cpu().double()).numpy()
    if (points == points[0]).all():  # scikit-learn would divide by their spread of 0
        return torch.zeros(len(points), 2, dtype=torch.float64, device='cpu')
    perplexity = min(_MAX_PERPLEXITY, (len(points) - 1) / 3)
    start = 'pca' if min(points.shape) >= 2 else 'random'
    return torch.from_numpy(TSNE(init=start, perplexity=perplexity, random_state=seed).fit_transform(points)).double()


def sample_pairs(target: torch.Tensor, num_pairs: int, seed: int = 0) -> torch.Tensor:
    """Draw indices (num_pairs, 2) of random pairs of images of different classes; none if there is a single class."""
    generator, target = torch.Generator('cpu').manual_seed(seed), target.cpu()
    found = torch.empty(0, 2, dtype=torch.long, device='cpu')
    while len(found) < num_pairs and len(target.unique()) > 1:
        pairs = torch.randint(len(target), (2 * num_pairs, 2), generator=generator, device='cpu')
        found = torch.cat([found, pairs[target[pairs[:, 0]] != target[pairs[:, 1]]]])
    return found[:num_pairs]


def confidence_and_entropy(logits: torch.Tensor) -> tuple[float, float]:
    """Return the mean maximum probability of logits (n, c), and the mean entropy of the probabilities in nats."""
    log_probs = logits.cpu().double().log_softmax(1)
    return log_probs.max(1).values.exp().mean().item(), (log_probs.exp() * -log_probs).sum(1).mean().item()


def count_third_class(classes: torch.Tensor, targets: torch.Tensor) -> int:
    """Count the mixes with a class (p,) that is neither of the two classes (p, 2) of their images."""
    return int((classes.cpu()[:, None] != targets.cpu()).all(1).sum())


def nearest_classes(mixed: torch.Tensor, embeddings: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the class (p,) of the nearest of the real embeddings (n, d) for each embedding (p, d) of a mix.

    The similarity is the cosine. A third class is a manifold intrusion (Guo, Mao & Zhang, MixUp as Locally Linear
    Out-Of-Manifold Regularization, 2019). `target` (n,) contains the classes of the real images.
    """
    real, points = F.normalize(embeddings.cpu().double()), F.normalize(mixed.cpu().double())
    return target.cpu()[torch.cat([(rows @ real.T).argmax(1) for rows in points.split(_TILE)])]
