"""Predictions and embeddings of mixes of two images of different classes."""
import torch
import torch.nn.functional as F

# Weights of the first image. The first and the last one give the images themselves.
SHARES = tuple(k / 10 for k in range(11))
_TILE = 1024


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
