"""Datasets of images with boxes, for training and testing detectors."""
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
        area: Area of its segmentation in square pixels; 0 for the area of the box.
        iscrowd: Whether the box contains a crowd. Detectors are not trained on it.
        difficult: Whether the object is difficult in the sense of Pascal VOC. Detectors are not trained on it.
    """
    box: Sequence[float]
    name: str
    area: float = 0.0
    iscrowd: bool = False
    difficult: bool = False


class DetectionDataset(torch.utils.data.Dataset):
    """Images with boxes. An item is a pair of an image (c, h, w) in [0, 1] and a dictionary of tensors.

    Boxes are clipped to the image. Boxes without area are dropped.

    Args:
        name: Name for messages and results.
        images: Path or pixels (h, w), size and objects of each image.
        classes: Names of the classes. The first one has the label 1.

    Raises:
        UsageError: if files are missing, or a box is not in its image.
    """

    def __init__(
            self, name: str, images: Iterable[tuple[str | np.ndarray, Size, list[Object]]], classes: Sequence[str]):
        self.name = name
        self.classes = tuple(classes)
        self.img_mode = 'RGB'
        self.hflip = 0.0
        self.training = False
        images = list(images)
        missing = [image for image, *_ in images if isinstance(image, str) and not os.path.isfile(image)]
        if missing:
            raise UsageError(f'{name}: {len(missing)} of {len(images)} images are missing. The first is {missing[0]}.')
        labels = {class_name: index for index, class_name in enumerate(self.classes, 1)}
        self.items = [
            (image, size, _target(objects, labels, size, f'{name}: {image}')) for image, size, objects in images]

    def match_classes(self, known: Sequence[str]) -> None:
        """Change the labels to those of the training data. Raise UsageError if these lack a class."""
        if unknown := sorted(set(self.classes) - set(known)):
            raise UsageError(f'{self.name}: the training data have no class {", ".join(unknown[:5])}.')
        labels = torch.tensor([0, *(known.index(name) + 1 for name in self.classes)])
        for *_, target in self.items:
            target['labels'] = labels[target['labels']]
        self.classes = tuple(known)

    def view(self, img_mode: str, training: bool = False, hflip: float = 0.0) -> 'DetectionDataset':
        """Return the same images in a PIL mode, without crowds and difficult objects for training."""
        view = copy.copy(self)
        view.img_mode, view.training, view.hflip = img_mode, training, hflip
        return view

    @property
    def sizes(self) -> list[Size]:
        """Width and height of each image."""
        return [size for _, size, _ in self.items]

    @property
    def has_objects(self) -> bool:
        """Whether there is an object that is neither a crowd nor difficult."""
        return any(len(_for_training(target)['boxes']) for *_, target in self.items)

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


def _clipped(box: Sequence[float], size: Size, where: str) -> tuple[float, ...]:
    """Clip a box to its image. One pixel of rounding is allowed."""
    (x1, y1, x2, y2), (width, height) = box, size
    if not (x1 <= x2 and y1 <= y2):  # also false for NaN
        raise UsageError(f'{where}: ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is not a box.')
    if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        raise UsageError(f'{where}: the box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) is outside the image of '
                         f'{width} x {height} pixels.')
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def _target(objects: list[Object], labels: dict[str, int], size: Size, where: str) -> dict[str, torch.Tensor]:
    if min(size) < 1:
        raise UsageError(f'{where}: width and height must be 1 or more, got {size}.')
    boxes = torch.tensor([_clipped(one.box, size, where) for one in objects], dtype=torch.float32).view(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    target = dict(
        boxes=boxes,
        labels=torch.tensor([labels[one.name] for one in objects], dtype=torch.int64),
        area=torch.tensor([one.area for one in objects], dtype=torch.float32),
        iscrowd=torch.tensor([one.iscrowd for one in objects], dtype=torch.int64),
        difficult=torch.tensor([one.difficult for one in objects], dtype=torch.bool))
    target['area'] = torch.where(target['area'] > 0, target['area'], areas)
    return {name: value[areas > 0] for name, value in target.items()}


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
                      f'but its annotation contains {size[0]} x {size[1]}.')
    return opened
