"""The scale of mixed logits at which a model fits mixes of its examples with clean logits of a sensible size.

Targets of even mixes of many examples are spread over many classes. For the mixed logits to follow them, the clean
logits of an example must have a gap between its class and the others that grows with the number of classes and the
length of the mixes. Where that is more than a confident prediction needs, the model is overconfident wherever it is
uncertain; where it is less, it is not confident enough. A factor on the mixed logits inside the loss takes the ratio
out of the model.
"""
import math
from functools import lru_cache

import numpy as np
import torch

# Probability that clean logits give the class of an example whose label is certain.
CONFIDENCE = 0.999

_MIXES = 1024


@lru_cache(maxsize=256)
def fitting_gap(num_classes: int, tuple_length: int, alpha: tuple[float, float]) -> float:
    """Gap between the logit of an example's class and the others with which mixed logits fit mixed targets best.

    That is the gap that minimises the expected cross-entropy of mixes of examples with random labels, if every example
    has logits `gap` for its class and 0 for the others. For mixes of very many examples it is the number of classes.

    Args:
        num_classes: Number of classes c.
        tuple_length: Number of examples m in a mix, at least 2.
        alpha: Range of Dirichlet concentrations.

    Returns:
        The gap; the same at every call. Draws nothing from PyTorch, and computes nothing with it.
    """
    # slow to import, for something that most runs do not ask for
    from scipy.optimize import brentq
    from scipy.special import softmax

    random = np.random.default_rng(0)
    # A column for each class that a mix has, at most m, and one for all that it lacks: those are alike.
    target = np.zeros((_MIXES, tuple_length))
    offset = np.full((_MIXES, tuple_length + 1), -np.inf)
    for row in range(_MIXES):
        weights = random.dirichlet(np.full(tuple_length, random.uniform(*alpha)))
        classes, column = np.unique(random.integers(num_classes, size=tuple_length), return_inverse=True)
        target[row, :len(classes)] = np.bincount(column, weights)
        offset[row, :len(classes)] = 0
        if len(classes) < num_classes:
            offset[row, -1] = math.log(num_classes - len(classes))

    def slope(gap: float) -> float:
        """Derivative of the mean cross-entropy."""
        mixed = offset.copy()
        mixed[:, :-1] += gap * target
        return ((softmax(mixed, axis=1)[:, :-1] - target) * target).sum(axis=1).mean()

    return brentq(slope, 0.0, 1e6, xtol=1e-6)


@torch.compiler.assume_constant_result
def fitting_scale(num_classes: int, tuple_length: int, alpha: tuple[float, float]) -> float:
    """Scale of mixed logits with which clean logits that fit mixes best are as confident as they should be.

    The ratio of the gap that fits mixes to the gap log((c - 1) p / (1 - p)) that gives the class of an example the
    probability p = 0.999. With the papers' alpha about 1 for 10 classes and mixes of 50, 2 for 36 classes and 9 for
    1000 classes and mixes of 128; with 1 / tuple_length 0.6, 0.7 and 1.

    Args:
        num_classes, tuple_length, alpha: As fitting_gap.

    Returns:
        The scale; 1 where nothing is mixed, or nothing classified.
    """
    if num_classes < 2 or tuple_length < 2:
        return 1.0
    wanted = math.log((num_classes - 1) * CONFIDENCE / (1 - CONFIDENCE))
    return fitting_gap(num_classes, tuple_length, alpha) / wanted
