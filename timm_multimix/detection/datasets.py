"""Images with boxes: the dataset that detectors are trained on, and checks of what annotation files contain."""
import copy
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ..common.errors import UsageError


class Annotated(NamedTuple):
    """An image and its objects.

    Attributes:
        image: Path of the image, or its pixels (h, w), uint8.
        size: Width and height in pixels.
        boxes: Boxes (n, 4) as x1, y1, x2, y2 in pixels.
        labels: Class indices (n,), starting at 1: 0 is the background.
        area: Areas (n,) in square pixels, of the segmentation where there is one.
        iscrowd: Whether a box (n,) contains a crowd, which is not trained on.
        difficult: Whether an object (n,) is difficult in the sense of Pascal VOC. It is not trained on.
    """
    image: str | np.ndarray
    size: tuple[int, int]
    boxes: torch.Tensor
    labels: torch.Tensor
    area: torch.Tensor
    iscrowd: torch.Tensor
    difficult: torch.Tensor

    @property
    def trainable(self) -> torch.Tensor:
        """Whether an object (n,) is trained on."""
        return ~(self.iscrowd.bool() | self.difficult)

    @classmethod
    def build(cls, image: str | np.ndarray, size: tuple[int, int], objects: list[tuple]) -> 'Annotated':
        """Make one from (box, label, area, iscrowd, difficult) for each object. Empty boxes are dropped."""
        kept = [one for one in objects if one[0][2] > one[0][0] and one[0][3] > one[0][1]]
        boxes, labels, area, iscrowd, difficult = zip(*kept, strict=True) if kept else [()] * 5
        return cls(
            image, size, torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(labels, dtype=torch.int64),
            torch.tensor(area, dtype=torch.float32), torch.tensor(iscrowd, dtype=torch.int64),
            torch.tensor(difficult, dtype=torch.bool))


class DetectionDataset(torch.utils.data.Dataset):
    """Images with boxes. An item is a pair of an image (c, h, w) in [0, 1] and a dictionary of tensors.

    Args:
        name: Name for messages and results.
        items: The images.
        classes: Class names; the label of the first is 1.
    """

    def __init__(self, name: str, items: list[Annotated], classes: tuple[str, ...]):
        self.name = name
        self.items = items
        self.classes = classes
        self.img_mode = 'RGB'
        self.hflip = 0.0
        self.training = False

    def view(self, img_mode: str, training: bool = False, hflip: float = 0.0) -> 'DetectionDataset':
        """The same images in a PIL mode. For training, only objects to train on, mirrored with a probability."""
        view = copy.copy(self)
        view.img_mode, view.training, view.hflip = img_mode, training, hflip
        return view

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        item = self.items[index]
        image = pil_to_tensor(_open(item, self.img_mode)).float() / 255
        kept = item.trainable if self.training else torch.ones_like(item.trainable)
        target = {
            name: getattr(item, name)[kept] for name in ('boxes', 'labels', 'area', 'iscrowd', 'difficult')}
        if self.hflip and torch.rand(()) < self.hflip:
            image = image.flip(-1)
            target['boxes'][:, [0, 2]] = item.size[0] - target['boxes'][:, [2, 0]]
        return image, target

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each image."""
        return [item.size for item in self.items]

    def first(self, count: int | None) -> 'DetectionDataset':
        """The first images only; all if count is None."""
        view = copy.copy(self)
        view.items = self.items[:count]
        return view


def _open(item: Annotated, img_mode: str) -> Image.Image:
    """Read an image.

    Raises:
        OSError: with one line that names the file, if it cannot be read or does not have the annotated size.
    """
    if not isinstance(item.image, str):
        return Image.fromarray(item.image).convert(img_mode)
    try:
        with Image.open(item.image) as image:
            image = image.convert(img_mode)
    except (OSError, ValueError, SyntaxError) as error:
        raise OSError(f'{item.image} cannot be read: {" ".join(str(error).split())}') from error
    if image.size != item.size:
        raise OSError(f'{item.image} has {image.size[0]} x {image.size[1]} pixels, '
                      f'but its annotation says {item.size[0]} x {item.size[1]}.')
    return image


def checked_box(box: Any, size: tuple[int, int], where: str) -> tuple[float, ...]:
    """A box as four numbers x1, y1, x2, y2, clipped to its image. One pixel of rounding is allowed.

    Raises:
        UsageError: if it is not a box in the image.
    """
    try:
        x1, y1, x2, y2 = map(float, box)
    except (TypeError, ValueError):
        raise UsageError(f'{where}: a box must be four numbers, got {box!r}.') from None
    width, height = size
    if not (x1 <= x2 and y1 <= y2):  # also false for NaN
        raise UsageError(f'{where}: ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is not a box.')
    if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        raise UsageError(f'{where}: the box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is outside the image of '
                         f'{width} x {height} pixels.')
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def check_files(paths: list[str], where: str) -> None:
    """Refuse missing image files.

    Raises:
        UsageError: with the first of them and their number.
    """
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UsageError(f'{where}: {len(missing)} of {len(paths)} images are missing. The first is {missing[0]}.')
