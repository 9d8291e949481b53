"""Out-of-distribution (OOD) detection: scores, metrics and noise images. Scores are float64 on the CPU for MPS."""
from collections.abc import Iterator

import numpy as np
import torch

NOISES = ('uniform', 'gaussian')


def max_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the maximum softmax probability as a score (n,), higher in distribution (Hendrycks & Gimpel, 2017).

    The score is the log-odds, log(p / (1 - p)), which order images like the probability p, even if p rounds to 1.
    """
    logits = logits.cpu().double()
    top = logits.max(1, keepdim=True)
    rest = (logits - top.values).scatter(1, top.indices, -torch.inf)
    return -rest.logsumexp(1)


def energy(logits: torch.Tensor) -> torch.Tensor:
    """Return the negative free energy, logsumexp of the logits, as a score (n,) (Liu et al., 2020)."""
    return logits.cpu().double().logsumexp(1)


SCORES = {'max_softmax': max_softmax, 'energy': energy}


def detection_metrics(scores_in: torch.Tensor, scores_out: torch.Tensor) -> dict[str, float]:
    """Compute metrics of OOD detection by a threshold on a score.

    Args:
        scores_in: Scores (n,) of in-distribution images, which should be higher.
        scores_out: Scores (m,) of OOD images.

    Returns:
        In percent: 'auroc'; 'aupr_in' and 'aupr_out', average precision with in-distribution or OOD images as the
        positive class; 'fpr95', the false positive rate at a true positive rate of 95 %, with in-distribution images as
        positives; 'accuracy', the accuracy of the best threshold with both kinds weighted equally.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # slow to import

    scores = torch.cat([scores_in, scores_out]).cpu().double().numpy()
    is_in = np.repeat([True, False], [len(scores_in), len(scores_out)])
    false, true, _ = roc_curve(is_in, scores, drop_intermediate=False)
    metrics = dict(
        auroc=roc_auc_score(is_in, scores),
        aupr_in=average_precision_score(is_in, scores),
        aupr_out=average_precision_score(~is_in, -scores),
        fpr95=false[true >= 0.95].min(),
        accuracy=((true + 1 - false) / 2).max(),
    )
    return {name: 100 * float(value) for name, value in metrics.items()}


def noise_batches(
        kind: str, num_images: int, input_size: tuple[int, int, int], batch_size: int, seed: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of noise images with independent pixels, and the label 0. The batch size does not change the noise.

    It is 'uniform' in [0, 1], or 'gaussian' with mean 0.5 and standard deviation 1, clipped to [0, 1].
    """
    generator = torch.Generator('cpu').manual_seed(seed)
    draw = torch.rand if kind == 'uniform' else torch.randn
    for start in range(0, num_images, batch_size):
        count = min(batch_size, num_images - start)
        # One image at a time: the numbers of a generator depend on the shape.
        images = torch.stack([draw(input_size, generator=generator, device='cpu') for _ in range(count)])
        images = images if kind == 'uniform' else (images + 0.5).clamp(0, 1)
        yield images, torch.zeros(count, dtype=torch.long, device='cpu')
