"""Images with boxes: the dataset that detectors are trained on, and checks of annotation files."""
import copy
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ..common.errors import UsageError

Size = tuple[int, int]  # width and height in pixels


class Object(NamedTuple):
    """An annotated object.

    Attributes:
        box: x1, y1, x2, y2 in pixels.
        name: Name of its class.
        area: Area in square pixels, of the segmentation where there is one.
        iscrowd: Whether the box contains a crowd, which is not trained on.
        difficult: Whether the object is difficult in the sense of Pascal VOC. It is not trained on.
    """
    box: Sequence[float]
    name: str
    area: float
    iscrowd: bool = False
    difficult: bool = False


class DetectionDataset(torch.utils.data.Dataset):
    """Images with boxes. An item is a pair of an image (c, h, w) in [0, 1] and a dictionary of tensors.

    Args:
        name: Name for messages and results.
        images: Path or pixels (h, w), size and objects of each image. Boxes without area are dropped.
        classes: Names of the classes in these images.
        known: Class names of the training images; the label of the first is 1. None for `classes`.

    Raises:
        UsageError: if files are missing or a class is not known.
    """

    def __init__(
            self,
            name: str,
            images: Iterable[tuple[str | np.ndarray, Size, list[Object]]],
            classes: Sequence[str],
            known: Sequence[str] | None = None,
    ):
        self.name = name
        self.classes = tuple(classes if known is None else known)
        self.img_mode = 'RGB'
        self.hflip = 0.0
        self.training = False
        if unknown := sorted(set(classes) - set(self.classes)):
            raise UsageError(f'{name}: the training data have no class {", ".join(unknown[:5])}.')
        images = list(images)
        missing = [image for image, *_ in images if isinstance(image, str) and not os.path.isfile(image)]
        if missing:
            raise UsageError(f'{name}: {len(missing)} of {len(images)} images are missing. The first is {missing[0]}.')
        labels = {name: index for index, name in enumerate(self.classes, 1)}
        self.items = [(image, size, _target(objects, labels)) for image, size, objects in images]

    def view(self, img_mode: str, training: bool = False, hflip: float = 0.0) -> 'DetectionDataset':
        """The same images in a PIL mode. For training, only objects to train on, mirrored with a probability."""
        view = copy.copy(self)
        view.img_mode, view.training, view.hflip = img_mode, training, hflip
        return view

    def first(self, count: int | None) -> 'DetectionDataset':
        """The first images only; all if count is None."""
        view = copy.copy(self)
        view.items = self.items[:count]
        return view

    @property
    def sizes(self) -> list[Size]:
        """Width and height of each image."""
        return [size for _, size, _ in self.items]

    def has_boxes(self, training: bool) -> bool:
        """Whether there is an object: to train on, or to test on."""
        return any(len(_for_training(target)['boxes'] if training else target['boxes']) for *_, target in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, size, target = self.items[index]
        pixels = pil_to_tensor(_open(image, size, self.img_mode)).float() / 255
        target = _for_training(target) if self.training else dict(target)
        if self.hflip and torch.rand(()) < self.hflip:
            pixels = pixels.flip(-1)
            x1, y1, x2, y2 = target['boxes'].unbind(1)
            target['boxes'] = torch.stack([size[0] - x2, y1, size[0] - x1, y2], dim=1)
        return pixels, target


def _target(objects: list[Object], labels: dict[str, int]) -> dict[str, torch.Tensor]:
    kept = [one for one in objects if one.box[2] > one.box[0] and one.box[3] > one.box[1]]
    return dict(
        boxes=torch.tensor([one.box for one in kept], dtype=torch.float32).view(-1, 4),
        labels=torch.tensor([labels[one.name] for one in kept], dtype=torch.int64),
        area=torch.tensor([one.area for one in kept], dtype=torch.float32),
        iscrowd=torch.tensor([one.iscrowd for one in kept], dtype=torch.int64),
        difficult=torch.tensor([one.difficult for one in kept], dtype=torch.bool))


def _for_training(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept = ~(target['iscrowd'].bool() | target['difficult'])
    return {name: value[kept] for name, value in target.items()}


def _open(image: str | np.ndarray, size: Size, img_mode: str) -> Image.Image:
    """Read an image. An OSError names the file in one line if it is unreadable or has another size."""
    if not isinstance(image, str):
        return Image.fromarray(image).convert(img_mode)
    try:
        with Image.open(image) as file:
            opened = file.convert(img_mode)
    except (OSError, ValueError, SyntaxError) as error:
        raise OSError(f'{image} cannot be read: {" ".join(str(error).split())}') from error
    if opened.size != size:
        raise OSError(f'{image} has {opened.size[0]} x {opened.size[1]} pixels, '
                      f'but its annotation says {size[0]} x {size[1]}.')
    return opened


def checked_size(width: int | str, height: int | str) -> Size:
    """The size of an image, which is positive."""
    size = int(width), int(height)
    if min(size) < 1:
        raise ValueError(f'width and height must be 1 or more, got {size}.')
    return size


def checked_box(box: Sequence[float], size: Size, where: str) -> tuple[float, ...]:
    """A box clipped to its image. One pixel of rounding is allowed.

    Raises:
        UsageError: if it is not a box in the image.
    """
    x1, y1, x2, y2 = box
    width, height = size
    if not (x1 <= x2 and y1 <= y2):  # also false for NaN
        raise UsageError(f'{where}: ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is not a box.')
    if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        raise UsageError(f'{where}: the box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is outside the image of '
                         f'{width} x {height} pixels.')
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
