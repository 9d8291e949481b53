"""Datasets that come with the package, for a first run on a machine with nothing else."""
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset as create_timm_dataset

DEMO_PREFIX = 'demo/'
_VALIDATION_EVERY = 5
_TRAIN_SPLITS = ('train', 'training')
_VALIDATION_SPLITS = ('val', 'valid', 'validation', 'eval', 'evaluation', 'test')


class DigitsDataset(torch.utils.data.Dataset):
    """scikit-learn's bundled digits: 1,797 real handwritten digits, 8 x 8 pixels, enlarged so that transforms work.

    The split is fixed: of every class each fifth image is held out, which keeps classes and writers balanced.

    Args:
        split: 'train' (1,442 images) or 'validation' (355 images), or a synonym that timm knows.
        img_mode: PIL mode of the images, such as 'RGB' or 'L'.
        transform: Applied to the PIL image; timm's create_loader sets it.
        target_transform: Applied to the class index.

    Raises:
        ValueError: if the split is unknown.
    """
    classes = tuple('0123456789')
    # Enlarged to less than usual image sizes: a crop at the loader's size then never throws resolution away.
    image_size = 32

    def __init__(
            self,
            split: str = 'train',
            img_mode: str = 'RGB',
            transform: Callable | None = None,
            target_transform: Callable | None = None,
    ):
        from sklearn.datasets import load_digits  # takes a second to import, which only the demo should pay

        if split not in _TRAIN_SPLITS + _VALIDATION_SPLITS:
            raise ValueError(f"demo/digits has the splits 'train' and 'validation', got {split!r}.")
        digits = load_digits()
        rank_in_class = np.zeros(len(digits.target), dtype=int)
        for index in range(len(self.classes)):
            members = np.flatnonzero(digits.target == index)
            rank_in_class[members] = np.arange(len(members))
        held_out = rank_in_class % _VALIDATION_EVERY == _VALIDATION_EVERY - 1
        self.indices = np.flatnonzero(~held_out if split in _TRAIN_SPLITS else held_out)
        self.images = (digits.images[self.indices] * (255 / 16)).round().astype(np.uint8)  # stored as 0 to 16
        self.targets = digits.target[self.indices].tolist()
        self.img_mode = img_mode
        self.transform = transform
        self.target_transform = target_transform

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = Image.fromarray(self.images[index])
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC).convert(self.img_mode)
        target = self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Name of an image: its class and its number in scikit-learn's order."""
        name = f'{self.indices[index]:04d}.png'
        return name if basename else f'{self.classes[self.targets[index]]}/{name}'

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        return [self.filename(index, basename, absolute) for index in range(len(self))]


class Demo(NamedTuple):
    """An embedded dataset.

    Attributes:
        dataset: Its class.
        description: What it is, for a log line.
        defaults: Options that suit it, for where the user gives none.
    """
    dataset: type[torch.utils.data.Dataset]
    description: str
    defaults: dict[str, Any]


DEMOS = {
    'demo/digits': Demo(DigitsDataset, '1,797 handwritten digits, 1,442 to train on and 355 to validate', dict(
        num_classes=10,
        img_size=64,
        crop_pct=1.0,  # the digits fill their images: a centre crop would cut them
        batch_size=64,
        epochs=9,
        opt='adamw',
        lr=1e-3,
        weight_decay=0.05,
        warmup_epochs=1,
        sched_on_updates=True,
        smoothing=0.0,
        scale=[0.7, 1.0],
        ratio=[0.85, 1.18],
        hflip=0.0,  # a mirrored 2 is no 2
        color_jitter=0.0,
        workers=0,  # decoding is nothing here, starting processes is not
        log_interval=10,
        checkpoint_hist=1,
    )),
}


def create_dataset(name: str, *, split: str = 'validation', input_img_mode: str = 'RGB', **kwargs):
    """timm's create_dataset, which also knows the embedded datasets under `demo/`.

    Args:
        name: 'demo/digits', or a name that timm knows.
        split: Name of the split.
        input_img_mode: PIL mode of the images.
        **kwargs: Of timm's create_dataset. An embedded dataset reads target_transform only.

    Raises:
        ValueError: if there is no such embedded dataset, or no such split of it.
    """
    if not name.lower().startswith(DEMO_PREFIX):
        return create_timm_dataset(name, split=split, input_img_mode=input_img_mode, **kwargs)
    if name.lower() not in DEMOS:
        raise ValueError(f'No embedded dataset {name!r}: there is {", ".join(DEMOS)}.')
    return DEMOS[name.lower()].dataset(
        split=split, img_mode=input_img_mode, target_transform=kwargs.get('target_transform'))
