"""What a model says of images between two classes, where there are none."""
import torch
import torch.nn.functional as F

# Shares of the first image; at the ends are the images themselves.
SHARES = tuple(k / 10 for k in range(11))
_TILE = 1024


def sample_pairs(target: torch.Tensor, num_pairs: int, seed: int = 0) -> torch.Tensor:
    """Indices (p, 2) of random pairs of images of different classes; fewer if there is but one class.

    Args:
        target: Class indices (n,).
        num_pairs: Number of pairs, p.
        seed: Of the draw.
    """
    generator = torch.Generator('cpu').manual_seed(seed)
    found = torch.empty(0, 2, dtype=torch.long, device='cpu')
    while len(found) < num_pairs and len(target.unique()) > 1:
        pairs = torch.randint(len(target), (2 * num_pairs, 2), generator=generator, device='cpu')
        found = torch.cat([found, pairs[target[pairs[:, 0]] != target[pairs[:, 1]]]])
    return found[:num_pairs]


def mix(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """share * first + (1 - share) * second."""
    return torch.lerp(second, first, share)


def confidence_and_entropy(logits: torch.Tensor) -> tuple[float, float]:
    """The mean highest probability, and the mean entropy of the probabilities in nats.

    Args:
        logits: Logits (n, c).
    """
    log_probs = logits.double().log_softmax(1)
    return log_probs.max(1).values.exp().mean().item(), (log_probs.exp() * -log_probs).sum(1).mean().item()


def count_misses(logits: torch.Tensor, targets: torch.Tensor) -> int:
    """How many mixed images are predicted as a class that neither of the two has (Zhang et al., mixup, 2018, figure 2).

    Args:
        logits: Logits (p, c) of p mixed pairs.
        targets: Class indices (p, 2) of the pairs.
    """
    return int((logits.argmax(1)[:, None] != targets).all(1).sum())


def count_intrusions(
        mixed: torch.Tensor,
        targets: torch.Tensor,
        embeddings: torch.Tensor,
        embedding_targets: torch.Tensor,
) -> int:
    """How many mixed embeddings intrude on the manifold of a third class.

    An intrusion is a mixed example that lies where a real example with another label is (Guo, Mao & Zhang, MixUp as
    Locally Linear Out-Of-Manifold Regularization, 2019). Counted here: mixed embeddings whose nearest real embedding,
    by angle, is of a class that neither of the two mixed images has.

    Args:
        mixed: Embeddings (p, d) of p mixed pairs.
        targets: Class indices (p, 2) of the pairs.
        embeddings: Embeddings (n, d) of the real images, those of the pairs among them.
        embedding_targets: Their class indices (n,).
    """
    real = F.normalize(embeddings.double())
    points = F.normalize(mixed.double())
    nearest = torch.cat([(rows @ real.T).argmax(1) for rows in points.split(_TILE)])
    return int((embedding_targets[nearest][:, None] != targets).all(1).sum())
