"""Embedded datasets for demos and tests without other data."""
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset as create_timm_dataset

from .dataset_types import TRAIN_SPLITS, VALIDATION_SPLITS, check_split
from .glyphs import FIGURES, LETTERS, render_glyphs
from .image_files import ImageFiles, as_image_files

DEMO_PREFIX = 'demo/'
_VALIDATION_EVERY = 5

# Options for small grayscale characters. Mirroring would change the class of some.
_CHARACTERS = dict(
    img_size=64,
    crop_pct=1.0,  # a center crop would cut the characters, which fill the images
    batch_size=64,
    opt='adamw',
    lr=1e-3,
    weight_decay=0.05,
    warmup_epochs=1,
    sched_on_updates=True,
    smoothing=0.0,
    scale=[0.7, 1.0],
    ratio=[0.85, 1.18],
    hflip=0.0,
    color_jitter=0.0,
    workers=0,  # starting processes takes longer than decoding
    log_interval=10,
    checkpoint_hist=1,
)


class EmbeddedDataset(torch.utils.data.Dataset):
    """Dataset of grayscale images in memory, enlarged to 32 x 32 pixels, with timm's interface.

    Args:
        images: uint8 images (n, h, w).
        targets: Class indices (n,).
        img_mode: PIL mode of the images, such as 'RGB' or 'L'.
        target_transform: Applied to the class index.
    """
    classes: tuple[str, ...]
    name: str  # displayed
    size: str  # displayed number of images
    epochs: int  # default for training
    transform: Callable | None = None  # timm's create_loader sets it

    def __init__(
            self, images: np.ndarray, targets: np.ndarray, img_mode: str = 'RGB',
            target_transform: Callable | None = None):
        self.images = images
        self.targets = targets.tolist()
        self.img_mode = img_mode
        self.target_transform = target_transform

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return default options for training."""
        return dict(num_classes=len(cls.classes), epochs=cls.epochs, **_CHARACTERS)

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = Image.fromarray(self.images[index])
        image = image.resize((32, 32), Image.Resampling.BICUBIC).convert(self.img_mode)
        target = self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


class Part(torch.utils.data.Subset):
    """Subset of a dataset with its own transform. Only images of the subset replace its unreadable images.

    The dataset is copied, so that its transform does not change.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, indices: Sequence[int]):
        super().__init__(copy.copy(dataset), indices)
        if isinstance(dataset, ImageFiles):
            self.dataset.replacements = np.sort(indices)

    @property
    def transform(self) -> Callable | None:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        self.dataset.transform = transform


def _canonical_split(split: str, **synonyms: tuple[str, ...]) -> str:
    for canonical, others in synonyms.items():
        if split in others:
            return canonical
    raise ValueError(f'the splits of this dataset are {", ".join(map(repr, synonyms))}, got {split!r}.')


class DigitsDataset(EmbeddedDataset):
    """scikit-learn's digits: 1,797 handwritten digits of 8 x 8 pixels, enlarged to 32 x 32.

    The split is fixed. Every fifth image of each class is held out, which balances classes and writers.

    Args:
        split: 'train' (1,442 images), 'validation' (355 images), or a synonym that timm accepts.
        **options: img_mode and target_transform of EmbeddedDataset.

    Raises:
        ValueError: if the split is unknown.
    """
    classes = tuple(FIGURES)
    name = 'handwritten digits'
    size = '1,442 training and 355 validation images'
    epochs = 9

    def __init__(self, split: str = 'train', **options: Any):
        from sklearn.datasets import load_digits  # slow import, needed only here

        split = _canonical_split(split, train=TRAIN_SPLITS, validation=(*VALIDATION_SPLITS, 'test'))
        digits = load_digits()
        rank_in_class = np.zeros(len(digits.target), dtype=int)
        for index in range(len(self.classes)):
            members = np.flatnonzero(digits.target == index)
            rank_in_class[members] = np.arange(len(members))
        held_out = rank_in_class % _VALIDATION_EVERY == _VALIDATION_EVERY - 1
        indices = np.flatnonzero(~held_out if split == 'train' else held_out)
        images = (digits.images[indices] * (255 / 16)).round().astype(np.uint8)  # stored as 0 to 16
        super().__init__(images, digits.target[indices], **options)


class GlyphsDataset(EmbeddedDataset):
    """Synthetic dataset of distorted, noisy figures and letters, 32 x 32 pixels.

    Each font belongs to one split, so that validation and test measure generalization to new fonts.

    Args:
        split: 'train', 'validation', 'test', or a synonym that timm accepts.
        num_samples: Number of images; the default is 2,000 for 'train', 1,000 for 'validation' and 3,000 for 'test'. A
            smaller dataset contains the first images of a larger one.
        **options: img_mode and target_transform of EmbeddedDataset.

    Raises:
        ValueError: if the split is unknown or num_samples is below 1.
    """
    classes = tuple(FIGURES + LETTERS)
    name = 'distorted, noisy figures and letters in 36 classes'
    size = '2,000 training images unless --train-num-samples is set'
    epochs = 30
    style = 'painted'

    def __init__(self, split: str = 'train', num_samples: int | None = None, **options: Any):
        split = _canonical_split(split, train=TRAIN_SPLITS, validation=VALIDATION_SPLITS, test=('test',))
        if num_samples is None:
            num_samples = dict(train=2000, validation=1000, test=3000)[split]
        if num_samples < 1:
            raise ValueError(f'The number of images must be at least 1, got {num_samples}.')
        images, targets = render_glyphs(split, num_samples, characters=''.join(self.classes), style=self.style)
        super().__init__(images, targets, **options)


class LettersDataset(GlyphsDataset):
    """Synthetic letters in the style of scikit-learn's digits, 8 x 8 pixels: out-of-distribution data for them."""
    classes = tuple(LETTERS)
    name = 'letters in the style of the digits'
    epochs = 9
    style = 'coarse'


DEMOS: dict[str, type[DigitsDataset] | type[GlyphsDataset]] = {
    'demo/digits': DigitsDataset, 'demo/glyphs': GlyphsDataset, 'demo/letters': LettersDataset}


def default_img_mode(in_chans: int) -> str:
    """Return the PIL mode for a number of input channels, as in timm's script."""
    return 'RGB' if in_chans == 3 else 'L'


def create_dataset(
        name: str, *, split: str = 'validation', input_img_mode: str = 'RGB', **kwargs: Any) -> Any:
    """Create an embedded dataset (`demo/...`) or a dataset of timm with additional checks.

    The split of a folder must exist. See as_image_files and ImageFiles for the other checks. Of the further arguments
    of timm's create_dataset, embedded datasets use target_transform, and the synthetic ones num_samples.

    Raises:
        ValueError: if the embedded dataset or the split does not exist, or if the class map is invalid.
    """
    if not name.lower().startswith(DEMO_PREFIX):
        check_split(name, kwargs.get('root'), split)
        if name.lower() in ('torch/image_folder', 'torch/folder'):
            kwargs['allow_empty'] = True  # as_image_files removes hidden folders
        dataset = create_timm_dataset(name, split=split, input_img_mode=input_img_mode, **kwargs)
        return as_image_files(dataset, kwargs.get('class_map') or '', input_img_mode)
    if name.lower() not in DEMOS:
        raise ValueError(f'There is no embedded dataset {name!r}. Choose from {", ".join(DEMOS)}.')
    dataset = DEMOS[name.lower()]
    options = dict(img_mode=input_img_mode, target_transform=kwargs.get('target_transform'))
    if issubclass(dataset, GlyphsDataset):
        options['num_samples'] = kwargs.get('num_samples')
    return dataset(split=split, **options)
