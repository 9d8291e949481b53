"""Map a timm or PyTorch criterion to the equivalent MultiMix loss options."""
from collections.abc import Callable
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn


def _class_weights(criterion: nn.Module) -> dict[str, torch.Tensor]:
    given = {name: getattr(criterion, name, None) for name in ('weight', 'pos_weight')}
    return {name: weight for name, weight in given.items() if weight is not None}


def loss_options(criterion: nn.Module | Callable) -> dict[str, Any]:
    """Map a criterion to the equivalent options of MultiMixLoss.

    Args:
        criterion: The loss for unmixed examples.

    Returns:
        'loss_type', 'smoothing', and class weights of MultiMixLoss.

    Raises:
        ValueError: If the criterion has no mixed form. The message gives the reason.
    """
    if isinstance(criterion, nn.CrossEntropyLoss):
        if criterion.reduction != 'mean' or criterion.ignore_index >= 0:
            raise ValueError("MultiMix supports no ignore_index of images, and only reduction='mean'.")
        return dict(loss_type='ce', smoothing=criterion.label_smoothing, **_class_weights(criterion))
    if isinstance(criterion, LabelSmoothingCrossEntropy):
        return dict(loss_type='ce', smoothing=criterion.smoothing)
    if isinstance(criterion, SoftTargetCrossEntropy):
        return dict(loss_type='ce', smoothing=0.0)
    if isinstance(criterion, BinaryCrossEntropy):
        if not criterion.sum_classes and criterion.reduction != 'mean':
            raise ValueError(f"MultiMix supports only reduction='mean', got reduction={criterion.reduction!r}.")
        # MultiMixTask smooths the targets.
        return dict(loss_type='bce', smoothing=0.0, **_class_weights(criterion))
    name = getattr(criterion, '__name__', None) or type(criterion).__name__
    raise ValueError(
        f'MultiMix supports cross-entropy and binary cross-entropy, got {name}: use one of them, or train without '
        'MultiMix.')


def check_num_classes(criterion: nn.Module | Callable, num_classes: int | None) -> None:
    """Check that the criterion is not softmax cross-entropy of a single class, which is always 0.

    Raises:
        ValueError: If it is.
    """
    kinds = (nn.CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, JsdCrossEntropy)
    if num_classes == 1 and isinstance(criterion, kinds):
        raise ValueError(
            'The softmax cross-entropy of a single class is always 0, so the model is not trained: use binary '
            "cross-entropy (loss 'bce') with targets (b, 1), or two classes.")
