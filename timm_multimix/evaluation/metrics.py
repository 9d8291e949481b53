"""Accuracy, calibration and selective classification, in float64 on the CPU because MPS has no float64."""
import torch
import torch.nn.functional as F

from ..calibration.temperature import fit_temperature
from .ood import max_softmax

NUM_BINS = 15
TOLERATED_RISK = 0.05


def classification_metrics(logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Compute the metrics of logits (n, c) for class indices (n,).

    Returns:
        - 'top1' and 'top5', accuracy in percent; 'top5' only for six classes or more.
        - 'nll', the mean negative log-likelihood.
        - 'brier', the squared distance between probabilities and one-hot target, summed over classes (0 to 2).
        - 'ece', 'adaptive_ece' and 'classwise_ece' in percent: see calibration_errors.
        - 'aurc' and 'coverage_at_5_risk' in percent: see selective_metrics.
    """
    from torchmetrics.functional.classification import multiclass_accuracy  # slow to import

    logits, target = logits.cpu().double(), target.cpu()
    num_classes = logits.shape[1]
    probs = logits.softmax(1)
    accuracy = {
        f'top{k}': 100 * multiclass_accuracy(probs, target, num_classes, average='micro', top_k=k).item()
        for k in (1, 5) if k == 1 or num_classes > 5}
    return dict(
        accuracy,
        nll=F.cross_entropy(logits, target).item(),
        brier=(probs - F.one_hot(target, num_classes)).square().sum(1).mean().item(),
        **calibration_errors(logits, target),
        **selective_metrics(logits, target),
    )


def calibration_errors(logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Compute expected calibration errors in percent, from logits (n, c) and class indices (n,).

    Returns:
        - 'ece': mean gap between confidence and accuracy over bins of equal width (Guo et al., 2017).
        - 'adaptive_ece': the same over bins with equally many images (Nguyen & O'Connor, 2015).
        - 'classwise_ece': for each class, the mean gap between its probability and its frequency over bins of equal
          width; the mean over classes (Kull et al., 2019).
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # slow to import

    probs, target = logits.cpu().double().softmax(1), target.cpu()
    num_classes = probs.shape[1]
    confidence, prediction = probs.max(1)
    gap = (confidence - (prediction == target).double())[confidence.argsort(stable=True)]
    adaptive = sum(part.sum().abs() for part in gap.tensor_split(NUM_BINS)) / len(target)
    classwise = 0.0
    for index in range(num_classes):  # one class at a time: n numbers in memory, not n * c
        of_class = probs[:, index]
        bins = (of_class * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        gaps = torch.bincount(bins, weights=of_class - (target == index).double(), minlength=NUM_BINS)
        classwise += gaps.abs().sum().item() / len(target)
    return dict(
        # torchmetrics uses float32 and would count a confidence that rounds to 1 in a bin of its own
        ece=100 * multiclass_calibration_error(
            probs.clamp(max=1 - 2 ** -24), target, num_classes, n_bins=NUM_BINS, norm='l1').item(),
        adaptive_ece=100 * adaptive.item(),
        classwise_ece=100 * classwise / num_classes,
    )


def selective_metrics(logits: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Compute metrics of a classifier that rejects the least confident images (Geifman & El-Yaniv, 2017).

    Coverage is the share of accepted images, risk the share of errors among them.

    Returns:
        In percent: 'aurc', the area under the risk-coverage curve, with ties of confidence in random order;
        'coverage_at_5_risk', the largest coverage of a threshold on confidence with a risk of at most 5 %.
    """
    logits, target = logits.cpu(), target.cpu()
    wrong = (logits.argmax(1) != target).double()
    # Ranks of equally confident images are equal. Log-odds order images whose confidence rounds to 1.
    _, rank = (-max_softmax(logits)).unique(return_inverse=True)
    count = torch.bincount(rank)
    errors = torch.bincount(rank, weights=wrong)
    num_accepted = torch.arange(1, len(target) + 1, dtype=torch.float64, device='cpu')
    risk = (errors / count).repeat_interleave(count).cumsum(0) / num_accepted
    tolerated = count.cumsum(0)[errors.cumsum(0) / count.cumsum(0) <= TOLERATED_RISK]
    return dict(
        aurc=100 * risk.mean().item(),
        coverage_at_5_risk=100 * tolerated.max().item() / len(target) if len(tolerated) else 0.0,
    )


def reliability(logits: torch.Tensor, target: torch.Tensor, num_bins: int = NUM_BINS) -> dict[str, list]:
    """Compute the points of a reliability diagram from logits (n, c) and class indices (n,).

    Returns:
        For each of the bins of equal width of confidence: 'count', the number of images, 'confidence', the mean
        confidence, and 'accuracy'. The means are NaN in bins without images.
    """
    confidence, prediction = logits.cpu().double().softmax(1).max(1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device='cpu')
    bins = torch.bucketize(confidence, edges[1:-1], right=True)
    count = torch.bincount(bins, minlength=num_bins)
    means = [torch.bincount(bins, weights=values.double(), minlength=num_bins) / count
             for values in (confidence, prediction == target.cpu())]
    return dict(count=count.tolist(), confidence=means[0].tolist(), accuracy=means[1].tolist())


def cross_fit(logits: torch.Tensor, target: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, list[float]]:
    """Divide the logits (n, c) of each half of the images by the temperature fitted on the other half.

    Returns:
        Divided logits (n, c), in float64 on the CPU, and the two temperatures.

    Raises:
        ValueError: if there are fewer than two images, or if no temperature fits a half.
    """
    if len(logits) < 2:
        raise ValueError('Cross-fitting a temperature needs two images or more.')
    generator = torch.Generator('cpu').manual_seed(seed)
    halves = torch.randperm(len(logits), generator=generator, device='cpu').chunk(2)
    logits, target = logits.cpu().double(), target.cpu()
    divided, temperatures = logits.clone(), []
    for own, other in (halves, halves[::-1]):
        temperatures.append(fit_temperature(logits[other], target[other]))
        divided[own] = logits[own] / temperatures[-1]
    return divided, temperatures
