"""The scale of mixed logits at which a model fits mixes of its examples with clean logits of a sensible size.

Targets of mixes of many examples are spread over many classes. For the mixed logits to follow them, the clean logits of
an example must have a gap between its class and the others that grows with the number of classes and the length of the
mixes. Where that is more than a confident prediction needs, the model is overconfident wherever it is uncertain; where
it is less, it is not confident enough. A factor on the mixed logits inside the loss takes the ratio out of the model.
"""
import math
from functools import lru_cache

import torch
from scipy.optimize import brentq

from .weights import sample_weights

# Probability that clean logits give the class of an example whose label is certain.
CONFIDENCE = 0.999

_BATCHES = 16
_MIXES = 64


@lru_cache(maxsize=256)
def fitting_gap(num_classes: int, batch_size: int, tuple_length: int, alpha: tuple[float, float]) -> float:
    """Gap between the logit of an example's class and the others with which mixed logits fit mixed targets best.

    That is the gap that minimises the expected cross-entropy of mixes, over batches of random labels, if every example
    has logits `gap` for its class and 0 for the others. For mixes of very many examples it is the number of classes.

    Args:
        num_classes: Number of classes c.
        batch_size: Number of examples b that mixes are made from.
        tuple_length: Number of examples m in a mix, at least 2.
        alpha: Range of Dirichlet concentrations.

    Returns:
        The gap; the same at every call.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (_BATCHES, batch_size), generator=generator)
    weights = sample_weights(
        _MIXES, batch_size, _BATCHES, alpha=alpha, tuple_length=tuple_length, generator=generator).double()
    # Classes that a batch lacks are alike: columns for those that it has, at most b, are enough.
    column = torch.stack([row.unique(return_inverse=True)[1] for row in labels])
    target = torch.zeros_like(weights).scatter_add_(2, column.unsqueeze(1).expand_as(weights), weights)
    absent = num_classes - column.amax(dim=1) - 1
    present = torch.arange(batch_size) <= column.amax(dim=1, keepdim=True)
    # exp(0) for every absent class, in one more column
    rest = torch.where(absent > 0, absent.double().log(), -torch.inf)[:, None, None].expand(-1, _MIXES, 1)

    def slope(gap: float) -> float:
        mixed = (gap * target).masked_fill(~present.unsqueeze(1), -torch.inf)
        predicted = torch.cat([mixed, rest], dim=2).softmax(dim=2)[:, :, :-1]
        return ((predicted - target) * target).sum(dim=2).mean().item()

    return brentq(slope, 0.0, 1e6, xtol=1e-6)


@torch.compiler.assume_constant_result
def fitting_scale(num_classes: int, batch_size: int, tuple_length: int, alpha: tuple[float, float]) -> float:
    """Scale of mixed logits with which clean logits that fit mixes best are as confident as they should be.

    The ratio of the gap that fits mixes to the gap log((c - 1) p / (1 - p)) that gives the class of an example the
    probability p = 0.999. About 1 for 10 classes and batches of 50, 2 for 36 classes and 9 for 1000 classes and batches
    of 128.

    Args:
        num_classes, batch_size, tuple_length, alpha: As fitting_gap.

    Returns:
        The scale; 1 where nothing is mixed, or nothing classified.
    """
    if num_classes < 2 or tuple_length < 2:
        return 1.0
    wanted = math.log((num_classes - 1) * CONFIDENCE / (1 - CONFIDENCE))
    return fitting_gap(num_classes, batch_size, tuple_length, alpha) / wanted
