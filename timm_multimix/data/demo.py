"""Datasets that come with the package, for a first run on a machine with nothing else."""
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset as create_timm_dataset

from .dataset_types import TRAIN_SPLITS, VALIDATION_SPLITS, check_split, dataset_prefix
from .glyphs import FIGURES, LETTERS, render_glyphs
from .image_files import DecodingReader, as_image_files

DEMO_PREFIX = 'demo/'
_VALIDATION_EVERY = 5


class EmbeddedDataset(torch.utils.data.Dataset):
    """Grey images held in memory, as timm reads datasets.

    Args:
        images: uint8 images (n, h, w).
        targets: Class indices (n,).
        names: Numbers that name the images, by default 0 to n - 1.
        img_mode: PIL mode of the images, such as 'RGB' or 'L'.
        transform: Applied to the PIL image; timm's create_loader sets it.
        target_transform: Applied to the class index.
    """
    classes: tuple[str, ...]
    # Enlarged to less than usual image sizes: a crop at the loader's size then never throws resolution away.
    image_size = 32

    def __init__(
            self,
            images: np.ndarray,
            targets: np.ndarray,
            names: Sequence[int] | None = None,
            img_mode: str = 'RGB',
            transform: Callable | None = None,
            target_transform: Callable | None = None,
    ):
        self.images = images
        self.targets = targets.tolist()
        self.indices = range(len(targets)) if names is None else names
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
        """Name of an image: its class and its number."""
        name = f'{self.indices[index]:04d}.png'
        return name if basename else f'{self.classes[self.targets[index]]}/{name}'

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        return [self.filename(index, basename, absolute) for index in range(len(self))]


class Part(torch.utils.data.Dataset):
    """Some of the images of a dataset, with a transform of their own.

    Args:
        dataset: Whose images; it is left as it is.
        indices: Which of them.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, indices: Sequence[int]):
        self.dataset = copy.copy(dataset)
        self.indices = list(indices)
        reader = getattr(self.dataset, 'reader', None)
        if isinstance(reader, DecodingReader):  # the other images must not take the place of an unreadable one
            self.dataset.reader = reader.restricted(self.indices)

    @property
    def transform(self) -> Callable | None:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.dataset[self.indices[index]]


def _known_split(name: str, split: str, **synonyms: tuple[str, ...]) -> str:
    for known, others in synonyms.items():
        if split in others:
            return known
    raise ValueError(f'{name} has the splits {", ".join(map(repr, synonyms))}, got {split!r}.')


class DigitsDataset(EmbeddedDataset):
    """scikit-learn's bundled digits: 1,797 real handwritten digits, 8 x 8 pixels, enlarged so that transforms work.

    The split is fixed: of every class each fifth image is held out, which keeps classes and writers balanced. Images
    are named by their number in scikit-learn's order.

    Args:
        split: 'train' (1,442 images) or 'validation' (355 images), or a synonym that timm knows.
        **options: Of EmbeddedDataset: img_mode, transform, target_transform.

    Raises:
        ValueError: if the split is unknown.
    """
    classes = tuple(FIGURES)

    def __init__(self, split: str = 'train', **options):
        from sklearn.datasets import load_digits  # takes a second to import, which only the demo should pay

        split = _known_split('demo/digits', split, train=TRAIN_SPLITS, validation=(*VALIDATION_SPLITS, 'test'))
        digits = load_digits()
        rank_in_class = np.zeros(len(digits.target), dtype=int)
        for index in range(len(self.classes)):
            members = np.flatnonzero(digits.target == index)
            rank_in_class[members] = np.arange(len(members))
        held_out = rank_in_class % _VALIDATION_EVERY == _VALIDATION_EVERY - 1
        indices = np.flatnonzero(~held_out if split == 'train' else held_out)
        images = (digits.images[indices] * (255 / 16)).round().astype(np.uint8)  # stored as 0 to 16
        super().__init__(images, digits.target[indices], indices, **options)


class GlyphsDataset(EmbeddedDataset):
    """Distorted, noisy figures and letters, 32 x 32 pixels, drawn on first use; as many as are asked for.

    Fonts of one split are in no other, so that validation and test ask for what fonts have in common.

    Args:
        split: 'train' (2,000 images unless told), 'validation' (1,000) or 'test' (3,000), or a synonym that timm knows.
        num_samples: Number of images. More images begin with those of fewer.
        seed: Seed of the images.
        **options: Of EmbeddedDataset: img_mode, transform, target_transform.

    Raises:
        ValueError: if the split is unknown, or the number of images below 1.
    """
    name = 'demo/glyphs'
    classes = tuple(FIGURES + LETTERS)
    coarse = False

    def __init__(self, split: str = 'train', num_samples: int | None = None, seed: int = 0, **options):
        split = _known_split(
            self.name, split, train=TRAIN_SPLITS, validation=VALIDATION_SPLITS, test=('test',))
        if num_samples is None:
            num_samples = dict(train=2000, validation=1000, test=3000)[split]
        if num_samples < 1:
            raise ValueError(f'{self.name} needs a number of images of at least 1, got {num_samples}.')
        images, targets = render_glyphs(
            split, num_samples, characters=''.join(self.classes), coarse=self.coarse, seed=seed)
        super().__init__(images, targets, **options)


class LettersDataset(GlyphsDataset):
    """Letters in the manner of scikit-learn's digits, 8 x 8 pixels: nothing a digit classifier should know."""
    name = 'demo/letters'
    classes = tuple(LETTERS)
    coarse = True


class Demo(NamedTuple):
    """An embedded dataset.

    Attributes:
        dataset: Its class.
        name: What it holds.
        size: How many there are.
        defaults: Options that suit it, for where the user gives none.
    """
    dataset: type[torch.utils.data.Dataset]
    name: str
    size: str
    defaults: dict[str, Any]


# Small grey characters, of which some are others when mirrored.
_CHARACTERS = dict(
    img_size=64,
    crop_pct=1.0,  # they fill their images: a centre crop would cut them
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
    workers=0,  # decoding is nothing here, starting processes is not
    log_interval=10,
    checkpoint_hist=1,
)

DEMOS = {
    'demo/digits': Demo(
        DigitsDataset,
        'handwritten digits',
        '1,442 to train on and 355 to validate',
        dict(num_classes=10, epochs=9, **_CHARACTERS),
    ),
    'demo/glyphs': Demo(
        GlyphsDataset,
        'figures and letters in 36 classes, distorted and noisy',
        '2,000 to train on unless --train-num-samples says',
        dict(num_classes=36, epochs=30, **_CHARACTERS),
    ),
    'demo/letters': Demo(
        LettersDataset,
        'letters in the manner of the digits',
        '2,000 to train on unless --train-num-samples says',
        dict(num_classes=26, epochs=9, **_CHARACTERS),
    ),
}


def default_img_mode(in_chans: int) -> str:
    """The mode of PIL that images of so many channels are read in, as in timm's script."""
    return 'RGB' if in_chans == 3 else 'L'


def create_dataset(name: str, *, split: str = 'validation', input_img_mode: str = 'RGB', **kwargs):
    """timm's create_dataset with the embedded datasets under `demo/`, and with checks that timm omits.

    A folder's split must exist, hidden folders are no classes, and images without a class are reported. Unreadable
    images are recorded and 16-bit images are scaled to 8 bits, see DecodingReader.

    Args:
        name: 'demo/digits', 'demo/glyphs', 'demo/letters', or a name that timm knows.
        split: Name of the split.
        input_img_mode: PIL mode of the images.
        **kwargs: Of timm's create_dataset. An embedded dataset reads target_transform, and num_samples if it can make
            any number of images.

    Raises:
        ValueError: if there is no such embedded dataset, no such split, or no valid class map.
    """
    if not name.lower().startswith(DEMO_PREFIX):
        return _create_timm_dataset(name, split, input_img_mode, kwargs)
    if name.lower() not in DEMOS:
        raise ValueError(f'No embedded dataset {name!r}: there is {", ".join(DEMOS)}.')
    dataset = DEMOS[name.lower()].dataset
    options = dict(img_mode=input_img_mode, target_transform=kwargs.get('target_transform'))
    if issubclass(dataset, GlyphsDataset):
        options['num_samples'] = kwargs.get('num_samples')
    return dataset(split=split, **options)


def _create_timm_dataset(name: str, split: str, input_img_mode: str, options: dict[str, Any]):
    check_split(name, options.get('root'), split)
    prefix = dataset_prefix(name)
    class_map = None
    if prefix not in ('hfds', 'hfids', 'tfds', 'wds'):  # images in files, whose classes are mapped afterwards
        class_map = options.get('class_map') or None
        options = {**options, 'class_map': None}
    if prefix == 'torch' and name.rpartition('/')[2].lower() in ('image_folder', 'folder'):
        options = {**options, 'allow_empty': True}  # hidden folders, which are left out later
    dataset = create_timm_dataset(name, split=split, input_img_mode=input_img_mode, **options)
    return as_image_files(dataset, input_img_mode, class_map)
