"""Plain training losses of timm and PyTorch, and the MultiMix loss that corresponds to each."""
from collections.abc import Callable
from typing import Any

from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn


def loss_options(criterion: nn.Module | Callable) -> dict[str, Any]:
    """Map a criterion to the options of MultiMixLoss that make it the mixed form of that criterion.

    Args:
        criterion: The loss that trains unmixed examples.

    Returns:
        'loss_type' and 'smoothing' of MultiMixLoss.

    Raises:
        ValueError: if the loss of a mix is not the mix's loss of logits and targets, with the reason.
    """
    if isinstance(criterion, nn.CrossEntropyLoss):
        if criterion.weight is not None or criterion.reduction != 'mean' or criterion.ignore_index >= 0:
            raise ValueError('MultiMix supports no class weights, no ignore_index, and no reduction but the mean.')
        return dict(loss_type='ce', smoothing=criterion.label_smoothing)
    if isinstance(criterion, LabelSmoothingCrossEntropy):
        return dict(loss_type='ce', smoothing=criterion.smoothing)
    if isinstance(criterion, SoftTargetCrossEntropy):
        return dict(loss_type='ce', smoothing=0.0)
    if isinstance(criterion, BinaryCrossEntropy):
        if criterion.weight is not None or criterion.pos_weight is not None:
            raise ValueError('MultiMix does not support class weights or positive weights of binary cross-entropy.')
        if not criterion.sum_classes and criterion.reduction != 'mean':
            raise ValueError(f'MultiMix needs a loss that is a mean, got reduction={criterion.reduction!r}.')
        return dict(loss_type='bce', smoothing=0.0)  # the task smooths, as timm's loss does
    name = getattr(criterion, '__name__', None) or type(criterion).__name__
    raise ValueError(
        f'MultiMix mixes cross-entropy and binary cross-entropy, and {name} is neither: use one of them, or train '
        'without MultiMix.')


def check_num_classes(criterion: nn.Module | Callable, num_classes: int | None) -> None:
    """Check that the loss depends on the logits.

    Raises:
        ValueError: for softmax cross-entropy of a single class, which is 0 whatever the logit.
    """
    kinds = (nn.CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, JsdCrossEntropy)
    if num_classes == 1 and isinstance(criterion, kinds):
        raise ValueError(
            'The softmax cross-entropy of a single class is always 0 and trains nothing: use binary cross-entropy '
            "(loss 'bce') with targets (b, 1), or two classes.")
