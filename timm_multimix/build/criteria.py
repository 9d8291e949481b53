"""timm's criteria: their arguments from the options of a run, and the equivalent MultiMix loss options."""
import argparse
import inspect
from collections.abc import Callable
from typing import Any

import torch
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
    create_classification_loss,
    load_class_stats,
    resolve_class_weights,
)
from torch import nn

from ..common.errors import UsageError, usage_errors
from .loaders import mixup_active


def _class_weights(criterion: nn.Module) -> dict[str, torch.Tensor]:
    given = {name: getattr(criterion, name, None) for name in ('weight', 'pos_weight')}
    return {name: weight for name, weight in given.items() if weight is not None}


def loss_options(criterion: nn.Module | Callable) -> dict[str, Any]:
    """Return the arguments of MultiMixLoss that are equivalent to a criterion: loss_type, smoothing and class weights.

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
        f"MultiMix supports cross-entropy and timm's BinaryCrossEntropy, got {name}: use one of them, or train without "
        'MultiMix.')


def check_num_classes(criterion: nn.Module | Callable, num_classes: int | None) -> None:
    """Raise ValueError if the criterion is softmax cross-entropy of a single class, which is always 0."""
    kinds = (nn.CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, JsdCrossEntropy)
    if num_classes == 1 and isinstance(criterion, kinds):
        raise ValueError(
            'The softmax cross-entropy of a single class is always 0, so the model is not trained: use binary '
            "cross-entropy (loss 'bce') with targets (b, 1), or two classes.")


def _weights_option(args: argparse.Namespace, kind: str, stats: tuple[torch.Tensor, int] | None) -> Any:
    weights = resolve_class_weights(
        getattr(args, f'loss_{kind}'),
        kind,
        stats,
        power=args.loss_weight_power,
        beta=args.loss_weight_beta,
        max_weight=args.loss_weight_max,
    )
    if isinstance(weights, torch.Tensor) and len(weights) != args.num_classes:
        option = f'--loss-{kind.replace("_", "-")}'
        raise UsageError(f'{option} has {len(weights)} entries but the model has {args.num_classes} classes.')
    return weights


def criterion_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return arguments for timm's create_classification_loss.

    Raises:
        UsageError: if class weights cannot be read, or do not match the number of classes.
    """
    with usage_errors('--class-stats, --loss-pos-weight or --loss-class-weight'):
        stats = load_class_stats(args.class_stats)
        names = inspect.signature(create_classification_loss).parameters
        options = dict(
            {name: getattr(args, name) for name in names if hasattr(args, name)},
            loss_type=args.loss,
            soft_targets=mixup_active(args),
            class_weight=_weights_option(args, 'class_weight', stats),
            pos_weight=_weights_option(args, 'pos_weight', stats),
            jsd_splits=args.aug_splits,
        )
    if args.loss == 'db' and stats is not None:
        options.update(class_counts=stats[0], num_samples=stats[1])
    return options
