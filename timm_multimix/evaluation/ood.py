"""Telling images of other kinds from those that a model was trained for, by what it says of them."""
from collections.abc import Iterator

import numpy as np
import torch

NOISES = ('uniform', 'gaussian')


def max_softmax(logits: torch.Tensor) -> torch.Tensor:
    """The highest probability (n,): high for images like the training images (Hendrycks & Gimpel, 2017).

    As minus the logarithm of the rest, which orders images as the probability does and still tells those apart whose
    probability rounds to 1.
    """
    logits = logits.double()
    top = logits.max(1, keepdim=True)
    rest = (logits - top.values).scatter(1, top.indices, -torch.inf)
    return -rest.logsumexp(1)


def energy(logits: torch.Tensor) -> torch.Tensor:
    """The negative free energy (n,), logsumexp of the logits: high for images as in training (Liu et al., 2020)."""
    return logits.double().logsumexp(1)


SCORES = {'max_softmax': max_softmax, 'energy': energy}


def detection_metrics(inside: torch.Tensor, outside: torch.Tensor) -> dict[str, float]:
    """How well a score tells images of the model's own kind (inside) from others (outside).

    Args:
        inside: Scores (n,) of images of the model's own kind, which should be higher.
        outside: Scores (m,) of others.

    Returns:
        In percent: 'auroc'; 'aupr_in' and 'aupr_out', average precision with the one or the other as what is looked
        for; 'fpr95', the share of others that passes where 95 % of the own pass; 'accuracy', of the best threshold,
        both kinds counted as equally frequent.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # slow to import

    scores = torch.cat([inside, outside]).double().cpu().numpy()
    own = np.repeat([True, False], [len(inside), len(outside)])
    false, true, _ = roc_curve(own, scores, drop_intermediate=False)
    metrics = dict(
        auroc=roc_auc_score(own, scores),
        aupr_in=average_precision_score(own, scores),
        aupr_out=average_precision_score(~own, -scores),
        fpr95=false[true >= 0.95].min(),
        accuracy=((true + 1 - false) / 2).max(),
    )
    return {name: 100 * float(value) for name, value in metrics.items()}


def noise_batches(
        kind: str,
        num_images: int,
        input_size: tuple[int, int, int],
        batch_size: int,
        seed: int = 0,
) -> Iterator[torch.Tensor]:
    """Batches of noise, every pixel drawn by itself.

    Args:
        kind: 'uniform' in [0, 1], or 'gaussian' of mean 0.5 and standard deviation 1, clipped to [0, 1].
        num_images: Images in all.
        input_size: Channels, height and width.
        batch_size: Images in a batch.
        seed: The same noise for the same seed, however it is batched.
    """
    generator = torch.Generator('cpu').manual_seed(seed)
    for start in range(0, num_images, batch_size):
        count = min(batch_size, num_images - start)
        # one by one: other numbers come out of a generator for other shapes
        draw = torch.rand if kind == 'uniform' else torch.randn
        images = torch.stack([draw(input_size, generator=generator, device='cpu') for _ in range(count)])
        yield images if kind == 'uniform' else (images + 0.5).clamp(0, 1)
