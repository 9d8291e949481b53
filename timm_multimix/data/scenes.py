"""Synthetic scenes for object detection: handwritten digits and printed glyphs on a cluttered background."""
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .demo import DigitsDataset
from .glyphs import FIGURES, FONTS, render_glyphs

SCENE_SIZE = 96
OBJECT_SIZES = 16, 32  # pixels of the longer side of a box
# A handwritten digit and the printed figure have the same class. All letters have one class, because each split has its
# own letters. O and I are not used: they look like 0 and 1.
LETTERS = {'train': 'ACEGJLNQSUWY', 'validation': 'BFKPTX', 'test': 'DHMRVZ'}
CLASSES = (*FIGURES, 'letter')
_MAX_OBJECTS = 6
_NUM_GLYPHS = 1000  # printed figures and letters of a split
_DIGITS = 2 / 3  # share of handwritten digits among the objects
_GLYPHS_SEED = 1  # demo/glyphs uses 0 by default
_VALIDATION_EVERY = 5  # every fifth training digit is used in validation scenes

_Objects = list[tuple[Image.Image, int]]  # masks and class indices


class Scene(NamedTuple):
    """An image and its objects."""
    image: np.ndarray  # (96, 96), uint8
    boxes: np.ndarray  # tight boxes (n, 4) as x1, y1, x2, y2 in pixels, float32
    labels: np.ndarray  # class indices (n,)


def digit_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the handwritten digits (n, 8, 8), uint8, of a split of the scenes, and their classes (n,)."""
    dataset = DigitsDataset('validation' if split == 'test' else 'train')
    images, targets = dataset.images, np.array(dataset.targets)
    if split == 'test':
        return images, targets
    for_validation = np.arange(len(targets)) % _VALIDATION_EVERY == 0
    kept = for_validation if split == 'validation' else ~for_validation
    return images[kept], targets[kept]


def _cropped(images: np.ndarray, labels: np.ndarray) -> _Objects:
    """Crop masks to their strokes. Empty masks are dropped."""
    objects = []
    for image, label in zip(images, labels.tolist(), strict=True):
        rows, columns = (np.flatnonzero((image > 127).any(axis=axis)) for axis in (1, 0))
        if len(rows):
            mask = image[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
            objects.append((Image.fromarray(mask), label))
    return objects


@lru_cache(maxsize=3)
def _objects(split: str) -> tuple[_Objects, _Objects]:
    """Return the masks of a split: handwritten digits, and printed figures and letters."""
    images, labels = digit_images(split)
    enlarged = np.stack([np.asarray(Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC)) for one in images])
    glyphs, characters = render_glyphs(
        split, _NUM_GLYPHS, characters=FIGURES + LETTERS[split], style='strokes', seed=_GLYPHS_SEED)
    return _cropped(enlarged, labels), _cropped(glyphs, characters.clip(max=CLASSES.index('letter')))


def _draw(objects: tuple[_Objects, _Objects], rng: np.random.Generator) -> tuple[Image.Image, int]:
    """Draw a random handwritten digit or printed glyph."""
    kind = objects[int(rng.random() >= _DIGITS)]
    return kind[rng.integers(len(kind))]


def _resize(mask: Image.Image, longer_side: int) -> np.ndarray:
    """Resize a mask to the given longer side, and scale it to [0, 1]."""
    scale = longer_side / max(mask.size)
    size = [max(round(side * scale), 3) for side in mask.size]
    return np.asarray(mask.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255


def _paint(image: np.ndarray, mask: np.ndarray, x: int, y: int, level: float) -> None:
    """Draw a mask with its upper left corner at (x, y)."""
    height, width = mask.shape
    region = image[y:y + height, x:x + width]
    region += mask * (level - region)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Draw a dark, uneven background."""
    knots = rng.normal(rng.uniform(0.1, 0.3), rng.uniform(0, 0.1), (5, 5)).astype(np.float32)
    return np.array(Image.fromarray(knots).resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BICUBIC))


def _add_clutter(image: np.ndarray, objects: tuple[_Objects, _Objects], rng: np.random.Generator) -> None:
    """Draw pieces of strokes that are too small to be recognized."""
    for _ in range(rng.integers(4, 13)):
        strokes = _resize(_draw(objects, rng)[0], int(rng.integers(24, 41)))
        side = int(rng.integers(5, 10))
        top, left = (rng.integers(max(length - side, 0) + 1) for length in strokes.shape)
        piece = strokes[top:top + side, left:left + side]
        x, y = (rng.integers(SCENE_SIZE - length + 1) for length in piece.shape[::-1])
        _paint(image, piece, x, y, rng.uniform(0.4, 1))


def _draw_scene(objects: tuple[_Objects, _Objects], rng: np.random.Generator) -> Scene:
    image = _background(rng)
    _add_clutter(image, objects, rng)
    boxes: list[Any] = []
    labels: list[int] = []
    for _ in range(rng.integers(1, _MAX_OBJECTS + 1)):
        drawn, label = _draw(objects, rng)
        mask = _resize(drawn, int(rng.integers(*OBJECT_SIZES, endpoint=True)))
        height, width = mask.shape
        x, y = int(rng.integers(SCENE_SIZE - width + 1)), int(rng.integers(SCENE_SIZE - height + 1))
        level = rng.uniform(0.6, 1)
        if any(x < x2 and x + width > x1 and y < y2 and y + height > y1 for x1, y1, x2, y2 in boxes):
            continue  # objects do not overlap
        _paint(image, mask, x, y, level)
        boxes.append((x, y, x + width, y + height))
        labels.append(label)
    image += rng.normal(0, rng.uniform(0.1, 0.2), image.shape)
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return Scene(pixels, np.array(boxes, dtype=np.float32), np.array(labels))


def render_scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """Draw scenes.

    The result is deterministic. A smaller `count` returns the first scenes of a larger one.

    Args:
        split: 'train', 'validation' or 'test'. Each split has its own handwritten digits, fonts and letters.
        count: Number of scenes.
        seed: Seed of the scenes.

    Raises:
        ValueError: if the split is unknown, or the number of scenes is below 1.
    """
    if split not in FONTS:
        raise ValueError(f'demo/scenes has the splits {", ".join(map(repr, FONTS))}, got {split!r}.')
    if count < 1:
        raise ValueError(f'The number of scenes of demo/scenes must be at least 1, got {count}.')
    objects = _objects(split)
    return [_draw_scene(objects, np.random.default_rng([seed, list(FONTS).index(split), index]))
            for index in range(count)]
