"""Adversarial attacks with captum, and common corruptions, of images in [0, 1] before normalization.

Kinds and parameters of the corruptions follow Hendrycks & Dietterich (2019). They are applied to the model's input
instead of the original image, so accuracies are not comparable to accuracies on ImageNet-C.
"""
import io
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur, pil_to_tensor, to_pil_image

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


SEVERITIES = (1, 2, 3, 4, 5)
_REFERENCE_SIZE = 224  # image size in pixels that the widths of the blur refer to


def _add_noise(images: torch.Tensor, std: float, generator: torch.Generator) -> torch.Tensor:
    # One image at a time: the numbers of a generator depend on the shape.
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator, device='cpu') for _ in images])
    return images + std * noise.to(images)


def _blur(images: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    sigma = sigma * min(images.shape[-2:]) / _REFERENCE_SIZE
    return gaussian_blur(images, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma, sigma])


def _brighten(images: torch.Tensor, shift: float, generator: torch.Generator) -> torch.Tensor:
    return images + shift


def _reduce_contrast(images: torch.Tensor, factor: float, generator: torch.Generator) -> torch.Tensor:
    return torch.lerp(images.mean((2, 3), keepdim=True), images, factor)


def _pixelate(images: torch.Tensor, factor: float, generator: torch.Generator) -> torch.Tensor:
    size = images.shape[-2:]
    small = F.interpolate(images, [max(1, round(side * factor)) for side in size], mode='area')
    return F.interpolate(small, size, mode='nearest-exact')


def _jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Compress and decompress an image of uint8 with one or three channels."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, 'JPEG', quality=quality)
    return pil_to_tensor(Image.open(buffer))


def _compress(images: torch.Tensor, quality: int, generator: torch.Generator) -> torch.Tensor:
    levels = (images * 255).round().to('cpu', torch.uint8)
    if images.shape[1] != 3:  # JPEG supports one or three channels
        levels = levels.flatten(0, 1)[:, None]
    return torch.stack([_jpeg(image, quality) for image in levels]).view(images.shape).to(images) / 255


# Function of each kind, and its parameter at each severity.
CORRUPTIONS = {
    'gaussian noise': (_add_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    'gaussian blur': (_blur, (1.0, 2.0, 3.0, 4.0, 6.0)),
    'brightness': (_brighten, (0.1, 0.2, 0.3, 0.4, 0.5)),
    'contrast': (_reduce_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    'pixelation': (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    'JPEG compression': (_compress, (25, 18, 15, 10, 7)),
}


def corrupt(images: torch.Tensor, kind: str, severity: int, generator: torch.Generator) -> torch.Tensor:
    """Corrupt images (b, c, h, w) in [0, 1] with a key of CORRUPTIONS and a severity from 1 to 5.

    The CPU generator draws noise. Splitting the images into batches does not change the noise.
    """
    function, parameters = CORRUPTIONS[kind]
    return function(images, parameters[SEVERITIES.index(severity)], generator).clamp(0, 1)
