"""Adversarial attacks with captum, on images in [0, 1] before normalization."""
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PIXEL_LEVELS = 255


def _log_odds(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the log-odds against the true class (b,). Cross-entropy is their softplus."""
    target = target[:, None]
    return logits.scatter(1, target, -torch.inf).logsumexp(1) - logits.gather(1, target)[:, 0]


# Cross-entropy increases with the log-odds, so both gradients have the same sign. In floating point the gradient of
# cross-entropy underflows to zero for confident predictions, and the attack does not change the image.
ATTACK_LOSSES = {'log-odds': _log_odds, 'cross-entropy': partial(F.cross_entropy, reduction='none')}


def _perturb(perturb: Callable[..., torch.Tensor], images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Input Tensor .* did not already require gradients')
        return perturb(images.detach().clone(), *args, **kwargs).detach()


def fgsm(
        model: nn.Module, images: torch.Tensor, target: torch.Tensor, epsilon: float, loss: str = 'log-odds',
) -> torch.Tensor:
    """Attack images with the fast gradient sign method (Goodfellow et al., 2015).

    Args:
        model: Maps images in [0, 1] to logits (b, c); in evaluation mode.
        images: Images (b, ...) in [0, 1].
        target: Class indices (b,).
        epsilon: Size of the step, as a fraction of the range of a pixel.
        loss: Loss to maximize: 'log-odds' against the true class, whose gradient does not vanish for confident
            predictions, or 'cross-entropy', as in published results.

    Returns:
        Images in [0, 1] that differ from the original images by at most epsilon.
    """
    from captum.robust import FGSM  # slow to import

    attack = FGSM(model, ATTACK_LOSSES[loss], 0.0, 1.0)
    attack.zero_thresh = 0.0  # captum's default treats gradients below 1e-6 as zero
    return _perturb(attack.perturb, images, epsilon, target)


def pgd(
        model: nn.Module, images: torch.Tensor, target: torch.Tensor, epsilon: float, step_size: float, num_steps: int,
        random_start: bool = True, loss: str = 'log-odds',
) -> torch.Tensor:
    """Attack images with projected gradient descent in the maximum norm (Madry et al., 2018). See fgsm.

    Args:
        epsilon: Radius of the ball, as a fraction of the range of a pixel.
        step_size: Size of a step, as a fraction of the range of a pixel.
        num_steps: Number of steps.
        random_start: Start from a random point of the ball, drawn from the global random state, instead of the images.
    """
    from captum.robust import PGD  # slow to import

    attack = PGD(model, ATTACK_LOSSES[loss], 0.0, 1.0)
    attack.fgsm.zero_thresh = 0.0
    return _perturb(attack.perturb, images, epsilon, step_size, num_steps, target, random_start=random_start)
