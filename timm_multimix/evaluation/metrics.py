"""How right a classifier is, and whether it knows how right."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..calibration import fit_temperature

NUM_BINS = 15


def classification_metrics(logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Accuracy and quality of the probabilities, over images.

    Args:
        logits: Logits (n, c).
        target: Class indices (n,).

    Returns:
        'top1' and 'top5' (of fewer classes, all of them) in percent; 'nll', the mean negative log-likelihood; 'brier',
        the mean squared distance of the probabilities from the one-hot target, summed over classes, between 0 and 2;
        'ece', the expected calibration error of the most probable class over 15 bins of equal width, in percent.
    """
    # slow to import
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    logits = logits.double()
    num_classes = logits.shape[1]
    probs = logits.softmax(1)
    accuracy = {
        f'top{k}': 100 * multiclass_accuracy(
            probs, target, num_classes, average='micro', top_k=min(k, num_classes)).item()
        for k in (1, 5)}
    return dict(
        accuracy,
        nll=F.cross_entropy(logits, target).item(),
        brier=(probs - F.one_hot(target, num_classes)).square().sum(1).mean().item(),
        # torchmetrics works in float32, where what rounds to 1 would get a bin of its own
        ece=100 * multiclass_calibration_error(
            probs.clamp(max=1 - 2 ** -24), target, num_classes, n_bins=NUM_BINS, norm='l1').item(),
    )


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows, for each bin of confidence; nan in bins without images.

    Attributes:
        count: Images in the bin.
        confidence: Their mean confidence.
        accuracy: The share of them that is classified correctly.
    """
    count: list[int]
    confidence: list[float]
    accuracy: list[float]


def reliability(logits: torch.Tensor, target: torch.Tensor, num_bins: int = NUM_BINS) -> Reliability:
    """Confidence against accuracy, in bins of equal width of the highest probability.

    Args:
        logits: Logits (n, c).
        target: Class indices (n,).
        num_bins: Number of bins.
    """
    confidence, prediction = logits.double().softmax(1).max(1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1], right=True)
    count = torch.bincount(bins, minlength=num_bins)
    sums = [torch.bincount(bins, weights=values.double(), minlength=num_bins)
            for values in (confidence, prediction == target)]
    return Reliability(count.tolist(), *((total / count).tolist() for total in sums))


@dataclass(frozen=True)
class Tempered:
    """Logits divided by a temperature that other images gave.

    Attributes:
        logits: Logits (n, c), divided.
        temperatures: The temperature, or the two of cross-fitting.
        fitted_on: Which images they were fitted on, in words.
    """
    logits: torch.Tensor
    temperatures: Sequence[float]
    fitted_on: str


def cross_fit(logits: torch.Tensor, target: torch.Tensor, seed: int = 0) -> Tempered:
    """Divide the logits of each half of the images by the temperature of the other half.

    So no image is judged with a temperature that it had a part in.

    Args:
        logits: Logits (n, c) of two images or more.
        target: Class indices (n,).
        seed: Of the random halves.

    Raises:
        ValueError: if no temperature fits a half.
    """
    if len(logits) < 2:
        raise ValueError('A temperature from other images needs two images or more.')
    generator = torch.Generator('cpu').manual_seed(seed)
    halves = torch.randperm(len(logits), generator=generator, device='cpu').chunk(2)
    divided, temperatures = logits.double(), []
    for own, other in (halves, halves[::-1]):
        temperatures.append(fit_temperature(logits[other], target[other]))
        divided[own] = logits[own].double() / temperatures[-1]
    return Tempered(divided, temperatures, 'the other half of the evaluated images, for each half')
