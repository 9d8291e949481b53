"""What a model says of images between two classes, where there are none."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Shares of the first image; at the ends are the images themselves.
SHARES = tuple(k / 10 for k in range(11))


def sample_pairs(target: torch.Tensor, num_pairs: int, seed: int = 0) -> torch.Tensor:
    """Indices (p, 2) of random pairs of images of different classes; fewer if there is but one class.

    Args:
        target: Class indices (n,).
        num_pairs: Number of pairs, p.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(0, 2, dtype=torch.long)
    while len(found) < num_pairs and len(target.unique()) > 1:
        pairs = torch.randint(len(target), (2 * num_pairs, 2), generator=generator)
        found = torch.cat([found, pairs[target[pairs[:, 0]] != target[pairs[:, 1]]]])
    return found[:num_pairs]


def mix(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """share * first + (1 - share) * second."""
    return torch.lerp(second, first, share)


def confidence_between(logits: torch.Tensor) -> dict[str, list[float]]:
    """Confidence and entropy along the way between two images.

    Args:
        logits: Logits (s, p, c) of p pairs at s shares.

    Returns:
        'confidence', the mean highest probability, and 'entropy' in nats, at each share.
    """
    log_probs = logits.double().log_softmax(2)
    return dict(
        confidence=log_probs.max(2).values.exp().mean(1).tolist(),
        entropy=(log_probs.exp() * -log_probs).sum(2).mean(1).tolist(),
    )


def count_misses(logits: torch.Tensor, targets: torch.Tensor) -> int:
    """How many mixed images are predicted as a class that neither of the two has (Zhang et al., mixup, 2018, figure 2).

    Args:
        logits: Logits (s, p, c) of p pairs at s shares.
        targets: Class indices (p, 2) of the pairs.
    """
    return int((logits.argmax(2)[..., None] != targets).all(2).sum())


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
        mixed: Embeddings (s, p, d) of p pairs at s shares.
        targets: Class indices (p, 2) of the pairs.
        embeddings: Embeddings (n, d) of the real images, those of the pairs among them.
        embedding_targets: Their class indices (n,).
    """
    real = F.normalize(embeddings.double())
    return sum(_count_third(F.normalize(part.double()), targets, real, embedding_targets) for part in mixed)


def _count_third(points: torch.Tensor, targets: torch.Tensor, real: torch.Tensor, classes: torch.Tensor) -> int:
    nearest: Sequence[torch.Tensor] = [(rows @ real.T).argmax(1) for rows in points.split(1024)]
    return int((classes[torch.cat(nearest)][:, None] != targets).all(1).sum())
