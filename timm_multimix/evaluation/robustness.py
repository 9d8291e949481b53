"""Adversarial attacks, by captum, on images in [0, 1] before they are normalised."""
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

PIXEL_LEVELS = 255


def parse_epsilon(text: str) -> float:
    """The size of a perturbation from text: '8' means 8 of the 255 levels of a pixel, '8/255' the same as a fraction.

    Returns:
        The size as a fraction of the range of a pixel.

    Raises:
        ValueError: if it is neither, negative, or more than the whole range. Also for a number between 0 and 0.1, which
            is sooner meant as a fraction than as a tenth of a level.
    """
    numerator, slash, denominator = str(text).partition('/')
    try:
        value = float(numerator) / (float(denominator) if slash else PIXEL_LEVELS)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f'{text!r} is no size: give levels of a pixel, such as 8, or a fraction, such as 8/255.') from None
    if not slash and 0 < float(numerator) < 0.1:
        raise ValueError(f'{text} of {PIXEL_LEVELS} levels changes nothing: write it as a fraction, such as 8/255.')
    if not 0 <= value <= 1:
        raise ValueError(f'{text} must lie between 0 and {PIXEL_LEVELS} levels, or between 0/255 and 1/1.')
    return value


def _loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Log-odds against the true class, for each image. Cross-entropy is softplus of it: gradients have the same sign.

    That of cross-entropy vanishes in a confident model, which would seem robust for no other reason.
    """
    target = target[:, None]
    return logits.scatter(1, target, -torch.inf).logsumexp(1) - logits.gather(1, target)[:, 0]


def _perturb(perturb: Callable[..., torch.Tensor], images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Input Tensor .* did not already require gradients')
        return perturb(images.detach().clone(), *args, **kwargs).detach()


def fgsm(model: nn.Module, images: torch.Tensor, target: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Images after the fast gradient sign method (Goodfellow et al., 2015).

    Args:
        model: Takes images in [0, 1], returns logits (b, c); in evaluation mode.
        images: Images (b, ...) in [0, 1].
        target: Class indices (b,).
        epsilon: Size of the step, as a fraction of the range of a pixel.

    Returns:
        Images in [0, 1] that differ by epsilon at most.
    """
    from captum.robust import FGSM  # slow to import

    attack = FGSM(model, _loss, 0.0, 1.0)
    attack.zero_thresh = 0.0  # it would leave pixels of small gradient alone, and with them whole confident images
    return _perturb(attack.perturb, images, epsilon, target)


def pgd(
        model: nn.Module,
        images: torch.Tensor,
        target: torch.Tensor,
        epsilon: float,
        step_size: float,
        num_steps: int,
        random_start: bool = True,
) -> torch.Tensor:
    """Images after projected gradient ascent in the maximum norm (Madry et al., 2018).

    Args:
        model: Takes images in [0, 1], returns logits (b, c); in evaluation mode.
        images: Images (b, ...) in [0, 1].
        target: Class indices (b,).
        epsilon: Radius of the ball, as a fraction of the range of a pixel.
        step_size: Size of a step, likewise.
        num_steps: Number of steps.
        random_start: Start at a random point of the ball, from the global random state; else at the images.

    Returns:
        Images in [0, 1] that differ by epsilon at most.
    """
    from captum.robust import PGD  # slow to import

    attack = PGD(model, _loss, 0.0, 1.0)
    attack.fgsm.zero_thresh = 0.0
    return _perturb(attack.perturb, images, epsilon, step_size, num_steps, target, random_start=random_start)
