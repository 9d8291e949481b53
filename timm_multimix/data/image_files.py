"""Image files: unreadable images, 16-bit images, hidden folders, and folders that are not classes."""
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder, find_images_and_targets
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets import DatasetFolder

_logger = logging.getLogger(__name__)

_SIXTEEN_TO_EIGHT = 257  # 65535 / 255
_MAX_SHOWN = 10
_MAX_IN_A_ROW = int(os.environ.get('TIMM_DATASET_MAX_RETRIES') or 10)  # as in timm
_EARLIER, _CURRENT = 1, 2
_IN_HIDDEN_FOLDER = re.compile(r'[/\\]\.[^/\\]+[/\\]')


def listed(names: Sequence[str], count: int | None = None) -> str:
    """Join the first names to a text. `count` is the number of all names if `names` contains only some of them."""
    count = len(names) if count is None else count
    first = [' '.join(name.split()) for name in names[:_MAX_SHOWN]]
    return ', '.join(first) + (f' and {count - len(first)} more' if count > len(first) else '')


class UnreadableImages:
    """Record of unreadable images of a dataset, in memory shared with the loader's workers."""

    def __init__(self, filename: Callable[[int], str], count: int):
        self.filename = filename
        self._flags = torch.zeros(count, dtype=torch.uint8, device='cpu').share_memory_()

    def __len__(self) -> int:
        """Return the number of images in the dataset."""
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


def image_root(dataset: Any) -> str | None:
    """Return the folder or archive of a dataset of image files, None for others, whose splits have the same root."""
    reader = getattr(dataset, 'reader', None)
    return os.path.realpath(reader.root) if isinstance(reader, (ReaderImageFolder, ReaderImageInTar)) else None


def unreadable_images(dataset: Any) -> UnreadableImages | None:
    """Return the record of unreadable images of a dataset or wrapped dataset, None if it has no record."""
    while not hasattr(dataset, 'unreadable') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return getattr(dataset, 'unreadable', None)


def _is_sixteen_bit(image: Image.Image) -> bool:
    if image.mode.startswith('I;16'):
        return True
    # Some formats open 16-bit files in the 32-bit mode I. The raw mode is available until the image is loaded.
    raw_modes = [tile[3] if isinstance(tile[3], str) else str(tile[3][0]) for tile in image.tile if tile[3]]
    is_ppm = any(tile[0].startswith('ppm') for tile in image.tile)  # PIL scales these to 16 bits
    return image.mode == 'I' and (is_ppm or any(mode.startswith('I;16') for mode in raw_modes))


def open_image(file: Any, mode: str | None) -> Image.Image:
    """Decode an image file and convert it to a PIL mode, if one is given.

    16-bit grayscale images are scaled to 8 bits by 1/257. PIL's conversion would clip them to 255.
    """
    image = Image.open(file)
    scales = bool(mode) and mode[0] not in 'IF' and _is_sixteen_bit(image)
    image.load()
    if scales:
        pixels = np.asarray(image).astype(np.int64).clip(0)
        image = Image.fromarray(((pixels + _SIXTEEN_TO_EIGHT // 2) // _SIXTEEN_TO_EIGHT).astype(np.uint8))
    return image.convert(mode) if mode else image


class ImageFiles(ImageDataset):
    """timm's ImageDataset with a record of unreadable images.

    An image is unreadable if reading or decoding raises any exception. It is replaced by the next image, as in timm, of
    the sorted indices `replacements` if they are set. 16-bit images are scaled to 8 bits.
    """
    replacements: np.ndarray | None = None

    def __init__(self, dataset: ImageDataset):
        super().__init__(
            None, dataset.reader, input_img_mode=dataset.input_img_mode, target_transform=dataset.target_transform,
            additional_features=dataset.additional_features)
        self.unreadable = UnreadableImages(self._name, len(self.reader))

    def _name(self, index: int, absolute: bool = False) -> str:
        with suppress(Exception):  # images in tables can have no names
            return self.reader.filename(index, absolute=absolute) or f'image {index}'
        return f'image {index}'

    def _next(self, index: int) -> int:
        if self.replacements is None:
            return (index + 1) % len(self)
        return int(self.replacements[np.searchsorted(self.replacements, index, 'right') % len(self.replacements)])

    def _load(self, index: int) -> tuple[Any, ...]:
        """Return the decoded image, target and features of an index, or of the next one that is readable."""
        for _ in range(_MAX_IN_A_ROW):
            try:
                file, *rest = self.reader[index]
                return open_image(file, self.input_img_mode), *rest
            except Exception as error:  # decoders raise exceptions of many types
                name, reason = self._name(index, absolute=True), ' '.join(str(error).split()) or type(error).__name__
                if self.unreadable.add(index):
                    _logger.warning(f'{name} cannot be read and is replaced by the next image: {reason}')
                index = self._next(index)
        raise RuntimeError(
            f'{_MAX_IN_A_ROW} images in a row cannot be read. The last one is {listed([name])}: {reason}')

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, target, *features = self._load(index)
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (image, target) if self.additional_features is None else (image, target, *features)


class _TorchvisionReader(ReaderImageFolder):
    """Reader of the images of a torchvision folder dataset, with a class map if one is given."""

    def __init__(self, dataset: DatasetFolder, class_map: str):
        self.root, self.samples, self.class_to_idx = dataset.root, dataset.samples, dataset.class_to_idx
        if class_map:
            names = {index: name for name, index in self.class_to_idx.items()}
            classes = self.class_to_idx = load_class_map(class_map, self.root)
            self.samples = [(path, classes[names[index]]) for path, index in self.samples if names[index] in classes]


def _drop_hidden(reader: ReaderImageFolder | ReaderImageInTar, class_map: str) -> None:
    """Remove images in hidden folders, such as .ipynb_checkpoints, and classes without other images."""
    in_tar = isinstance(reader, ReaderImageInTar)
    start = len(reader.root)  # faster than os.path.relpath for millions of images
    names = reader.filenames() if in_tar else [path[start:] for path, _ in reader.samples]
    visible = [index for index, name in enumerate(names) if not _IN_HIDDEN_FOLDER.search(f'/{name}')]
    if not visible:
        raise RuntimeError(f'Found 0 images of the classes in {reader.root}.')
    if len(visible) == len(names):
        return
    _logger.info(f'{reader.root}: {len(names) - len(visible)} images in hidden folders are ignored.')
    targets = reader.targets.tolist() if in_tar else [target for _, target in reader.samples]
    classes = reader.class_name_to_idx if in_tar else reader.class_to_idx
    used = sorted(classes.values() if class_map else {targets[index] for index in visible})
    order = {index: index if class_map else position for position, index in enumerate(used)}
    classes = {name: order[index] for name, index in classes.items() if index in order}
    targets = [order[targets[index]] for index in visible]
    if in_tar:
        reader.samples, reader.targets, reader.class_name_to_idx = reader.samples[visible], np.array(targets), classes
    else:
        reader.samples = [(reader.samples[index][0], target) for index, target in zip(visible, targets, strict=True)]
        reader.class_to_idx = classes


def _report_unused(reader: ReaderImageFolder, class_map: str) -> None:
    """Warn about folders that are not classes, and about classes of a class map without images."""
    start = len(reader.root)
    used = {path[start:].lstrip(os.sep).split(os.sep)[0] for path, _ in reader.samples}
    with os.scandir(reader.root) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    if unused := [name for name in folders if name not in used]:
        of_classes = f' of the classes in {class_map}' if class_map else ''
        if class_map:
            images = [find_images_and_targets(os.path.join(reader.root, name), sort=False)[0] for name in unused]
            unused = [f'{name} ({len(found)} images)' for name, found in zip(unused, images, strict=True)]
        _logger.warning(
            f'{len(unused)} of the {len(folders)} folders in {reader.root} contain no images{of_classes} and are '
            f'ignored: {listed(unused)}.')
    targets = {target for _, target in reader.samples}
    if empty := [name for name, index in reader.class_to_idx.items() if index not in targets]:
        _logger.warning(
            f'{len(empty)} of the {len(reader.class_to_idx)} classes in {class_map} have no images in {reader.root}: '
            f'{listed(empty)}.')


def as_image_files(dataset: Any, class_map: str = '', input_img_mode: str = 'RGB') -> Any:
    """Convert a dataset of image files to ImageFiles. Other datasets are returned unchanged.

    In folders and archives, hidden folders are ignored. Folders without images of a class are reported.

    Raises:
        ValueError: if the class map does not map names to indices.
        RuntimeError: if a folder or archive has no images.
    """
    if isinstance(dataset, DatasetFolder):
        dataset = ImageDataset(
            None, _TorchvisionReader(dataset, class_map), input_img_mode=input_img_mode,
            target_transform=dataset.target_transform)
    if type(dataset) is not ImageDataset:
        return dataset
    if isinstance(dataset.reader, (ReaderImageFolder, ReaderImageInTar)):
        is_folder = isinstance(dataset.reader, ReaderImageFolder)
        classes = dataset.reader.class_to_idx if is_folder else dataset.reader.class_name_to_idx
        if not all(isinstance(name, str) and type(index) is int and index >= 0 for name, index in classes.items()):
            raise ValueError(f'The class map {class_map} must map names to indices from 0.')
        _drop_hidden(dataset.reader, class_map)
        if is_folder:
            _report_unused(dataset.reader, class_map)
    return ImageFiles(dataset)
