"""Adversarial attacks with captum, on images in [0, 1] before normalisation."""
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PIXEL_LEVELS = 255


def parse_epsilon(text: str) -> float:
    """Parse the size of a perturbation: '8' stands for 8 of the 255 levels of a pixel, '8/255' for the fraction.

    Returns:
        The size as a fraction of the range of a pixel.

    Raises:
        ValueError: if the text is no number, or the size is negative or above the whole range. Also for a number
            between 0 and 0.1 without a slash, which is more likely a fraction than a tenth of a level.
    """
    numerator, slash, denominator = str(text).partition('/')
    try:
        value = float(numerator) / (float(denominator) if slash else PIXEL_LEVELS)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f'{text!r} is not a size: give levels of a pixel, such as 8, or a fraction, such as 8/255.') from None
    if not slash and 0 < float(numerator) < 0.1:
        raise ValueError(f'{text} of {PIXEL_LEVELS} levels changes nothing: write it as a fraction, such as 8/255.')
    if not 0 <= value <= 1:
        raise ValueError(f'{text} must lie between 0 and {PIXEL_LEVELS} levels, or between 0/255 and 1/1.')
    return value


def _log_odds(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Log-odds against the true class (b,). Cross-entropy is softplus of it."""
    target = target[:, None]
    return logits.scatter(1, target, -torch.inf).logsumexp(1) - logits.gather(1, target)[:, 0]


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target, reduction='none')


# Cross-entropy increases with the log-odds, so both gradients have the same sign. In floating point the gradient of
# cross-entropy underflows to zero for confident predictions, and the attack then leaves the image as it is.
ATTACK_LOSSES = {'log-odds': _log_odds, 'cross-entropy': _cross_entropy}


def _perturb(perturb: Callable[..., torch.Tensor], images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Input Tensor .* did not already require gradients')
        return perturb(images.detach().clone(), *args, **kwargs).detach()


def fgsm(
        model: nn.Module, images: torch.Tensor, target: torch.Tensor, epsilon: float, loss: str = 'log-odds',
) -> torch.Tensor:
    """Fast gradient sign method (Goodfellow et al., 2015).

    Args:
        model: Maps images in [0, 1] to logits (b, c); in evaluation mode.
        images: Images (b, ...) in [0, 1].
        target: Class indices (b,).
        epsilon: Size of the step, as a fraction of the range of a pixel.
        loss: Loss whose gradient is followed: 'log-odds' against the true class, which does not vanish for confident
            predictions, or 'cross-entropy', as in published results.

    Returns:
        Images in [0, 1] that differ from the given ones by at most epsilon.
    """
    from captum.robust import FGSM  # slow to import

    attack = FGSM(model, ATTACK_LOSSES[loss], 0.0, 1.0)
    attack.zero_thresh = 0.0  # captum's default treats gradients below 1e-6 as zero
    return _perturb(attack.perturb, images, epsilon, target)


def pgd(
        model: nn.Module, images: torch.Tensor, target: torch.Tensor, epsilon: float, step_size: float, num_steps: int,
        random_start: bool = True, loss: str = 'log-odds',
) -> torch.Tensor:
    """Projected gradient descent in the maximum norm (Madry et al., 2018). Other arguments and the result are fgsm's.

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
