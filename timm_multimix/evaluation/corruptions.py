"""Common corruptions of images in [0, 1], at five severities.

Kinds and parameters follow Hendrycks & Dietterich (2019). They are applied to the model's input instead of the original
image, so accuracies are not comparable to accuracies on ImageNet-C.
"""
import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur, jpeg

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


def _compress(images: torch.Tensor, quality: int, generator: torch.Generator) -> torch.Tensor:
    levels = (images * 255).round().to('cpu', torch.uint8)
    in_color = images.shape[1] == 3  # JPEG supports one or three channels
    compressed = jpeg(levels if in_color else levels.flatten(0, 1)[:, None], quality)
    return compressed.view(images.shape).to(images) / 255


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
    """Corrupt images (b, c, h, w) in [0, 1].

    Args:
        images: The images.
        kind: A key of CORRUPTIONS.
        severity: 1 to 5.
        generator: CPU generator of the noise. Splitting the images into batches does not change the noise.
    """
    function, parameters = CORRUPTIONS[kind]
    return function(images, parameters[SEVERITIES.index(severity)], generator).clamp(0, 1)
