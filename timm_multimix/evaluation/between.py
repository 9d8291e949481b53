"""Predictions and embeddings of mixes of two images of different classes."""
import torch
import torch.nn.functional as F

# Weights of the first image; at the ends are the images themselves.
SHARES = tuple(k / 10 for k in range(11))
_TILE = 1024


def sample_pairs(target: torch.Tensor, num_pairs: int, seed: int = 0) -> torch.Tensor:
    """Indices (num_pairs, 2) of random pairs of images of different classes; none if there is a single class."""
    generator, target = torch.Generator('cpu').manual_seed(seed), target.cpu()
    found = torch.empty(0, 2, dtype=torch.long, device='cpu')
    while len(found) < num_pairs and len(target.unique()) > 1:
        pairs = torch.randint(len(target), (2 * num_pairs, 2), generator=generator, device='cpu')
        found = torch.cat([found, pairs[target[pairs[:, 0]] != target[pairs[:, 1]]]])
    return found[:num_pairs]


def mix(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """share * first + (1 - share) * second."""
    return torch.lerp(second, first, share)


def confidence_and_entropy(logits: torch.Tensor) -> tuple[float, float]:
    """Mean maximum probability of logits (n, c), and mean entropy of the probabilities in nats."""
    log_probs = logits.cpu().double().log_softmax(1)
    return log_probs.max(1).values.exp().mean().item(), (log_probs.exp() * -log_probs).sum(1).mean().item()


def count_misses(logits: torch.Tensor, targets: torch.Tensor) -> int:
    """Count mixes with logits (p, c) that are predicted as a third class (mixup, Zhang et al., 2018, figure 2)."""
    return int((logits.argmax(1)[:, None] != targets).all(1).sum())


def count_intrusions(
        mixed: torch.Tensor, targets: torch.Tensor, embeddings: torch.Tensor, embedding_targets: torch.Tensor) -> int:
    """Count manifold intrusions: mixed embeddings that lie at real examples of a third class.

    The term is from Guo, Mao & Zhang, MixUp as Locally Linear Out-Of-Manifold Regularization, 2019. A mix counts if the
    class of the nearest real embedding, by cosine similarity, is neither of its two classes.

    Args:
        mixed: Embeddings (p, d) of p mixed pairs.
        targets: Class indices (p, 2) of the pairs.
        embeddings: Embeddings (n, d) of the real images, including those of the pairs.
        embedding_targets: Class indices (n,) of the real images.
    """
    real = F.normalize(embeddings.cpu().double())
    points = F.normalize(mixed.cpu().double())
    nearest = torch.cat([(rows @ real.T).argmax(1) for rows in points.split(_TILE)])
    return int((embedding_targets.cpu()[nearest][:, None] != targets.cpu()).all(1).sum())
