"""Datasets of image files, with handling of unreadable images, 16-bit images, hidden folders and class maps."""
import copy
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets import DatasetFolder

_logger = logging.getLogger(__name__)

_SIXTEEN_TO_EIGHT = 257  # 65535 / 255
_MAX_SHOWN = 10
_MAX_IN_A_ROW = int(os.environ.get('TIMM_DATASET_MAX_RETRIES') or 10)  # as in timm
_EARLIER, _CURRENT = 1, 2


def listed(names: Sequence[str], count: int | None = None) -> str:
    """Join the first names to a text.

    Args:
        names: Names.
        count: Total number, if `names` contains only some of them.
    """
    count = len(names) if count is None else count
    first = [' '.join(name.split()) for name in names[:_MAX_SHOWN]]
    return ', '.join(first) + (f' and {count - len(first)} more' if count > len(first) else '')


def one_line(error: BaseException) -> str:
    """Return the message of an exception as one line, or its type if the message is empty."""
    return ' '.join(str(error).split()) or type(error).__name__


class UnreadableImages:
    """Record of unreadable images of a dataset, in memory shared with the loader's workers.

    Args:
        filename: Function that returns the name of an image for its index.
        count: Number of images in the dataset.
    """

    def __init__(self, filename: Callable[[int], str], count: int):
        self.filename = filename
        self._flags = torch.zeros(count, dtype=torch.uint8, device='cpu').share_memory_()

    def __len__(self) -> int:
        """Number of images in the dataset."""
        return len(self._flags)

    def add(self, index: int) -> bool:
        """Record an image. Return whether it was not recorded before in this run."""
        is_new = not self._flags[index]
        self._flags[index] = _CURRENT
        return is_new

    def begin_epoch(self) -> None:
        """Start a new epoch without recorded images."""
        self._flags.clamp_(max=_EARLIER)

    def in_epoch(self) -> list[int]:
        """Return the indices of the images recorded since begin_epoch, in order."""
        return (self._flags == _CURRENT).nonzero().flatten().tolist()

    def in_run(self) -> list[int]:
        """Return the indices of all recorded images, in order."""
        return self._flags.nonzero().flatten().tolist()

    def update(self, indices: Iterable[int]) -> None:
        """Record unreadable images of other processes or of a resumed run."""
        for index in indices:
            if 0 <= index < len(self):
                self._flags[index] = _CURRENT

    def names(self, indices: Sequence[int]) -> str:
        """Return the names of the first images as text."""
        return listed([self.filename(index) for index in indices[:_MAX_SHOWN]], len(indices))


def unreadable_images(dataset: Any) -> UnreadableImages | None:
    """Get the record of unreadable images of a dataset or wrapped dataset; None without a DecodingReader."""
    while not isinstance(getattr(dataset, 'reader', None), DecodingReader) and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    reader = getattr(dataset, 'reader', None)
    return reader.unreadable if isinstance(reader, DecodingReader) else None


def _is_sixteen_bit(image: Image.Image) -> bool:
    if image.mode.startswith('I;16'):
        return True
    # Some formats open 16-bit files in the 32-bit mode I. The raw mode is available until the image is loaded.
    raw_modes = [tile[3] if isinstance(tile[3], str) else str(tile[3][0]) for tile in image.tile if tile[3]]
    is_ppm = any(tile[0].startswith('ppm') for tile in image.tile)  # PIL scales these to 16 bits
    return image.mode == 'I' and (is_ppm or any(mode.startswith('I;16') for mode in raw_modes))


def open_image(file: Any, mode: str | None) -> Image.Image:
    """Decode an image.

    16-bit greyscale images are scaled to 8 bits by 1/257. PIL's conversion would clip them to 255.

    Args:
        file: Open file or path.
        mode: PIL mode of the result; empty or None for the mode of the file.
    """
    image = Image.open(file)
    scales = bool(mode) and mode[0] not in 'IF' and _is_sixteen_bit(image)
    image.load()
    if scales:
        pixels = np.asarray(image).astype(np.int64).clip(0)
        image = Image.fromarray(((pixels + _SIXTEEN_TO_EIGHT // 2) // _SIXTEEN_TO_EIGHT).astype(np.uint8))
    return image.convert(mode) if mode else image


class _Decoded:
    """Decoded image with the interface of the open file that ImageDataset reads."""
    __slots__ = ('image',)

    def __init__(self, image: Image.Image):
        self.image = image

    def read(self) -> Image.Image:
        return self.image


class DecodingReader(Reader):
    """Reader that decodes the images of another reader, for ImageDataset with load_bytes=True.

    An image is unreadable if reading or decoding raises any exception. It is replaced by the next image, as in timm.
    16-bit images are scaled to 8 bits. Other attributes are forwarded to the inner reader.

    Args:
        inner: timm's reader of the files.
        mode: PIL mode of the images.

    Attributes:
        unreadable: Record of unreadable images.
    """

    def __init__(self, inner: Reader, mode: str | None = 'RGB'):
        super().__init__()
        self.inner = inner
        self.mode = mode
        self.unreadable = UnreadableImages(self._name, len(inner))
        self._allowed: np.ndarray | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'inner':  # looked up while the object is copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def restricted(self, indices: Sequence[int]) -> 'DecodingReader':
        """Return a copy that replaces unreadable images only by the given images."""
        reader = copy.copy(self)
        reader._allowed = np.zeros(len(self), dtype=bool)
        reader._allowed[indices] = True
        return reader

    def __len__(self) -> int:
        return len(self.inner)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.inner.filename(index, basename, absolute)

    def _name(self, index: int, absolute: bool = False) -> str:
        with suppress(Exception):  # images in tables can have no names
            return self.inner.filename(index, absolute=absolute) or f'image {index}'
        return f'image {index}'

    def _next(self, index: int) -> int:
        if self._allowed is None:
            return (index + 1) % len(self)
        return (index + 1 + int(np.roll(self._allowed, -index - 1).argmax())) % len(self)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        for _ in range(_MAX_IN_A_ROW):
            try:
                file, *rest = self.inner[index]
                return _Decoded(open_image(file, self.mode)), *rest
            except Exception as error:  # decoders raise exceptions of many types
                name, reason = self._name(index, absolute=True), one_line(error)
                if self.unreadable.add(index):
                    _logger.warning(f'{name} cannot be read and is replaced by the next image: {reason}')
                index = self._next(index)
        raise RuntimeError(
            f'{_MAX_IN_A_ROW} images in a row cannot be read. The last one is {listed([name])}: {reason}')


class _SampleReader(Reader):
    """Reader for the images of a torchvision folder dataset."""

    def __init__(self, dataset: DatasetFolder):
        super().__init__()
        self.root = dataset.root
        self.samples = list(dataset.samples)
        self.class_to_idx = dict(dataset.class_to_idx)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return open(path, 'rb'), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class _Samples:
    """Editable classes and images of a reader."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.in_tar = isinstance(reader, ReaderImageInTar)
        self.class_to_idx: dict[str, int] = reader.class_name_to_idx if self.in_tar else reader.class_to_idx
        self.targets = list(reader.targets) if self.in_tar else [target for _, target in reader.samples]

    @property
    def filenames(self) -> list[str]:
        """Relative names of the images."""
        if self.in_tar:
            return self.reader.filenames()
        start = len(self.reader.root)  # faster than os.path.relpath for millions of images
        return [path[start:].lstrip(os.sep) for path, _ in self.reader.samples]

    @property
    def names(self) -> dict[int, str]:
        """Name of each class index."""
        return {index: name for name, index in self.class_to_idx.items()}

    def set(self, class_to_idx: dict[str, int], targets: list[int | None]) -> None:
        """Set the classes and the class of each image. Images with the class None are removed."""
        selected = [index for index, target in enumerate(targets) if target is not None]
        if not selected:
            raise RuntimeError(f'Found 0 images of the classes in {self.reader.root}.')
        self.class_to_idx, self.targets = class_to_idx, [targets[index] for index in selected]
        if self.in_tar:
            self.reader.samples = self.reader.samples[selected]
            self.reader.targets = np.array(self.targets)
            self.reader.class_name_to_idx, self.reader.class_idx_to_name = class_to_idx, self.names
        else:
            self.reader.samples = [(self.reader.samples[index][0], targets[index]) for index in selected]
            self.reader.class_to_idx = class_to_idx


def _is_hidden(filename: str) -> bool:
    filename = filename.replace(os.sep, '/')
    if '/.' not in filename and not filename.startswith('.'):
        return False
    folders = filename.split('/')[:-1]
    return any(folder.startswith('.') and folder not in ('.', '..') for folder in folders)


def _drop_hidden(samples: _Samples) -> None:
    """Remove images in hidden folders, such as .ipynb_checkpoints, and classes without other images."""
    hidden = [_is_hidden(name) for name in samples.filenames]
    names = samples.names
    visible = {target for target, is_hidden in zip(samples.targets, hidden, strict=True) if not is_hidden}
    if not any(hidden) and len(visible) == len(names):
        return
    order = {old: new for new, old in enumerate(sorted(visible))}
    if any(hidden):
        _logger.info(f'{samples.reader.root}: {sum(hidden)} images in hidden folders are ignored.')
    samples.set(
        {names[old]: new for old, new in order.items()},
        [None if is_hidden else order[target] for target, is_hidden in zip(samples.targets, hidden, strict=True)])


def read_class_map(class_map: str, root: str) -> dict[str, int]:
    """Read a file that maps class names to indices.

    Raises:
        ValueError: if the file cannot be read or does not map names to indices.
    """
    try:
        classes = load_class_map(class_map, root)
    except Exception as error:  # pickle raises exceptions of many types
        raise ValueError(f'The class map {class_map} cannot be read: {one_line(error)}') from error
    is_index = (isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in classes.values())
    if not classes or not all(is_index) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f'The class map {class_map} must map names to indices from 0.')
    return classes


def _apply_class_map(samples: _Samples, class_map: str) -> None:
    """Apply the class indices of a class map. Images of other classes are removed with a warning."""
    root, names = samples.reader.root, samples.names
    classes = read_class_map(class_map, root)
    counts = Counter(names[target] for target in samples.targets)
    missing = {name: counts[name] for name in sorted(counts) if name not in classes}
    if missing:
        examples = listed([f'{name or "(no folder)"} ({count} images)' for name, count in missing.items()])
        _logger.warning(
            f'The class map {class_map} lacks {len(missing)} of the {len(counts)} classes in {root}. Their '
            f'{sum(missing.values())} images are ignored: {examples}.')
    if empty := [name for name in classes if name not in counts]:
        _logger.warning(
            f'{len(empty)} of the {len(classes)} classes in the class map {class_map} have no images in {root}: '
            f'{listed(empty)}.')
    samples.set(classes, [classes.get(names[target]) for target in samples.targets])


def _report_empty_folders(samples: _Samples) -> None:
    """Warn about folders without images, which are not classes."""
    if samples.in_tar or not os.path.isdir(samples.reader.root):
        return
    used = {name.split(os.sep)[0] for name in samples.filenames}
    with os.scandir(samples.reader.root) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    if empty := [name for name in folders if name not in used]:
        _logger.warning(
            f'{len(empty)} of the {len(folders)} folders in {samples.reader.root} contain no images and are ignored: '
            f'{listed(empty)}.')


def _clean(reader: Reader, class_map: str | None) -> Reader:
    """Remove hidden folders, apply the class map, and report empty folders."""
    if isinstance(reader, (ReaderImageFolder, ReaderImageInTar, _SampleReader)):
        samples = _Samples(reader)
        _report_empty_folders(samples)
        _drop_hidden(samples)
        if class_map:
            _apply_class_map(samples, class_map)
    return reader


def as_image_files(dataset: Any, input_img_mode: str | None = 'RGB', class_map: str | None = None) -> Any:
    """Add a DecodingReader to a dataset of image files. Other datasets are returned unchanged.

    Hidden folders are ignored. Empty folders, and images of classes that are not in the class map, are reported.

    Args:
        dataset: Dataset of timm or torchvision.
        input_img_mode: PIL mode of the images.
        class_map: File that maps class names to indices, for an image folder.
    """
    if isinstance(dataset, DatasetFolder):
        reader, features = _SampleReader(dataset), None
    elif type(dataset) is ImageDataset:
        reader, features = dataset.reader, dataset.additional_features
    else:
        return dataset
    return ImageDataset(
        root=None, reader=DecodingReader(_clean(reader, class_map), input_img_mode), load_bytes=True,
        input_img_mode=input_img_mode, target_transform=dataset.target_transform, additional_features=features)
