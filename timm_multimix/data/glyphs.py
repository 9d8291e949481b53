"""Randomly distorted letters and figures, rendered with matplotlib's fonts."""
import math
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FIGURES = '0123456789'
LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'

# Each font belongs to one split. Computer Modern is the only family in two splits, because its styles differ most.
FONTS = {
    'train': (
        'DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSans-Oblique', 'DejaVuSansMono', 'DejaVuSansMono-Bold',
        'DejaVuSerif', 'DejaVuSerif-Bold', 'DejaVuSerif-Italic', 'cmr10', 'cmtt10',
    ),
    'validation': ('cmb10', 'cmss10', 'cmti10'),
    'test': ('STIXGeneral', 'STIXGeneralBol', 'STIXGeneralItalic', 'STIXGeneralBolIta'),
}

IMAGE_SIZE = 32
_CANVAS = 2 * IMAGE_SIZE  # glyphs are drawn and distorted at twice the size, then downsampled
_BLOCK = 500  # images per random state; the first images do not depend on the number of images


@lru_cache(maxsize=8)
def _templates(split: str, characters: str) -> torch.Tensor:
    """Draw centered, blurred glyphs (fonts, characters, canvas, canvas) in [0, 1]. A threshold makes them strokes."""
    folder = Path(matplotlib.get_data_path(), 'fonts', 'ttf')
    templates = []
    for name in FONTS[split]:
        font = ImageFont.truetype(str(folder / f'{name}.ttf'), round(0.85 * _CANVAS))
        for character in characters:
            canvas = Image.new('L', (_CANVAS, _CANVAS))
            left, top, right, bottom = font.getbbox(character)
            corner = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
            ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font)
            templates.append(np.asarray(canvas.filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(templates)).unflatten(0, (len(FONTS[split]), len(characters)))


def _uniform(size: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(size, generator=generator)


def _smooth_noise(count: int, channels: int, knots: int, generator: torch.Generator) -> torch.Tensor:
    """Draw fields (count, channels, canvas, canvas), standard normal at knots x knots points and smooth in between."""
    field = torch.randn((count, channels, knots, knots), generator=generator)
    return F.interpolate(field, _CANVAS, mode='bicubic', align_corners=True)


def _distort(templates: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Apply random affine and elastic maps and stroke widths. Return strokes (count, canvas, canvas) in [0, 1]."""
    count = len(templates)
    angle = _uniform((count,), -math.pi / 9, math.pi / 9, generator)
    shear = _uniform((count,), -0.3, 0.3, generator)
    stretch = _uniform((count, 2), math.log(0.75), math.log(1.3), generator).exp()
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    skew = torch.eye(2).repeat(count, 1, 1)
    skew[:, 0, 1] = shear
    linear = rotation @ skew / stretch.unsqueeze(1)  # maps image to template, so a large stretch enlarges
    offset = _uniform((count, 2, 1), -0.15, 0.15, generator)
    grid = F.affine_grid(torch.cat([linear, offset], dim=2), [count, 1, _CANVAS, _CANVAS], align_corners=False)
    grid = grid + 0.06 * _smooth_noise(count, 2, 6, generator).permute(0, 2, 3, 1)
    sampled = F.grid_sample(templates.unsqueeze(1), grid, align_corners=False).squeeze(1)
    threshold = _uniform((count, 1, 1), 0.2, 0.55, generator)
    return ((sampled - threshold) / 0.15 + 0.5).clamp(0, 1)


def _paint(strokes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw light or dark strokes on uneven backgrounds with noise. Return images (count, size, size) in [0, 1]."""
    count = len(strokes)
    contrast = _uniform((count, 1, 1), 0.25, 0.8, generator)
    contrast = contrast * torch.where(torch.rand((count, 1, 1), generator=generator) < 0.5, -1, 1)
    middle = 0.5 + _uniform((count, 1, 1), -0.5, 0.5, generator) * (1 - contrast.abs())
    background = _smooth_noise(count, 1, 5, generator).squeeze(1) * _uniform((count, 1, 1), 0, 0.15, generator)
    images = F.avg_pool2d(middle + contrast * (strokes - 0.5) + background, 2)
    noise = torch.randn(images.shape, generator=generator) * _uniform((count, 1, 1), 0, 0.15, generator)
    return (images + noise).clamp(0, 1)


def _extent(inked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return center and half length of the inked part of lines (count, canvas), in units of a sampling grid."""
    first, last = inked.int().argmax(dim=1), _CANVAS - inked.flip(1).int().argmax(dim=1)
    return (first + last) / _CANVAS - 1, (last - first) / _CANVAS


def _coarsen(strokes: torch.Tensor) -> torch.Tensor:
    """Crop strokes and average them over blocks, as in scikit-learn's digits. Return images (count, 8, 8) in [0, 1]."""
    inked = strokes > 0.5
    (y, half_height), (x, half_width) = _extent(inked.any(dim=2)), _extent(inked.any(dim=1))
    half = torch.maximum(half_height, half_width)
    box = torch.zeros(len(strokes), 2, 3)
    box[:, 0, 0], box[:, 1, 1], box[:, 0, 2], box[:, 1, 2] = half, half, x, y
    grid = F.affine_grid(box, [len(strokes), 1, _CANVAS, _CANVAS], align_corners=False)
    fitted = F.grid_sample(strokes.unsqueeze(1), grid, align_corners=False)
    return (F.adaptive_avg_pool2d(fitted, 8).squeeze(1) * 16).round() / 16  # 17 levels


# Functions that convert strokes (_BLOCK, canvas, canvas) to images.
_STYLES = {
    'painted': _paint,
    'coarse': lambda strokes, generator: _coarsen(strokes),
    'strokes': lambda strokes, generator: strokes,
}


@lru_cache(maxsize=8)
def render_glyphs(
        split: str,
        count: int,
        *,
        characters: str = FIGURES + LETTERS,
        style: str = 'painted',
        seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Render distorted characters.

    The result is deterministic. A smaller `count` returns the first images of a larger one.

    Args:
        split: 'train', 'validation' or 'test'. Each split has its own fonts.
        count: Number of images.
        characters: Classes in order. The classes alternate, so that any number of images is balanced.
        style: 'painted' for 32 x 32 images with background and noise, 'coarse' for 8 x 8 images in the style of
            scikit-learn's digits, light on black, 'strokes' for 64 x 64 masks of the strokes.
        seed: Seed of the images. Each split has its own random states.

    Returns:
        Images (count, h, w), uint8, and their class indices (count,). They are read-only, because they are cached.
    """
    blocks = []
    with torch.device('cpu'):
        templates = _templates(split, characters)
        for block in range(math.ceil(count / _BLOCK)):
            state = np.random.SeedSequence([seed, list(FONTS).index(split), block]).generate_state(1)[0]
            generator = torch.Generator('cpu').manual_seed(int(state))
            fonts = torch.randint(len(templates), (_BLOCK,), generator=generator)
            classes = torch.arange(block * _BLOCK, (block + 1) * _BLOCK) % len(characters)
            strokes = _distort(templates[fonts, classes], generator)
            blocks.append(_STYLES[style](strokes, generator))
    images = (torch.cat(blocks)[:count] * 255).round().to(torch.uint8).numpy()
    targets = np.arange(count) % len(characters)
    images.setflags(write=False)
    targets.setflags(write=False)
    return images, targets
