"""Images to evaluate on, resized and cropped as each model was trained, in [0, 1] before normalisation."""
import copy
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..build.datasets import dataset_suggestion
from ..common.command_line import check_dataset_packages
from ..common.errors import UsageError, near_names, printable, usage_errors
from ..data.class_names import class_mapping, dataset_classes, map_targets
from ..data.dataset_types import DATASET_TYPES, NEED_FOLDER, check_split, dataset_prefix
from ..data.demo import DEMO_PREFIX, DEMOS, create_dataset
from ..data.image_files import unreadable_images
from ..data.loading import batches_of
from .models import Candidate
from .ood import NOISES

_logger = logging.getLogger(__name__)

_HIGHEST_LEVEL = 255


@dataclass(frozen=True)
class Source:
    """Source of images.

    Attributes:
        dataset: Name of a dataset, as for --dataset of `timm-multimix train`; '' for a folder of images.
        root: Folder.
        split: Name of the split.
        options: Further arguments of timm's create_dataset.
    """
    dataset: str
    root: str | None
    split: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return printable(f'{self.dataset or self.root} ({self.split})')

    def check(self) -> None:
        """Check the name without reading images.

        Raises:
            UsageError: if there is no such folder or dataset, or if a package that reads the dataset is missing.
        """
        if self.dataset.lower().startswith(DEMO_PREFIX):
            exists = self.dataset.lower() in DEMOS
        else:
            exists = _has_type(self.dataset) or (self.root is not None and os.path.exists(self.root))
        if not exists:
            name = self.dataset or self.root
            hint = near_names(name, (*DEMOS, *NOISES)) or near_names(name.partition('/')[0], DATASET_TYPES)
            raise UsageError(
                f'Data {self}: no such folder or dataset.{hint} Datasets are {", ".join(DEMOS)} and '
                f'{"/NAME, ".join(DATASET_TYPES)}/NAME.')
        with usage_errors(f'Data {self}'):
            check_split(self.dataset, self.root, self.split)
        check_dataset_packages('Data', self.dataset)
        if self.root is None and self.dataset.partition('/')[0].lower() in NEED_FOLDER:
            raise UsageError(f'Data {self} is read from a folder: give it with --data-dir, or as NAME=FOLDER in --ood.')

    def open(self, img_mode: str) -> Dataset:
        """Open the dataset with images of a PIL mode."""
        with usage_errors(f'Data {self}', dataset_suggestion(self.dataset)):
            return create_dataset(
                self.dataset, root=self.root, split=self.split, input_img_mode=img_mode, **self.options)


def _has_type(name: str) -> bool:
    return dataset_prefix(name) in (DEMO_PREFIX.rstrip('/'), *DATASET_TYPES)


def parse_source(text: str, split: str, download: bool = False) -> Source:
    """Parse a source: FOLDER, NAME of a dataset or NAME=FOLDER, each with @SPLIT for another split than the default."""
    if os.path.exists(text):  # a name may contain @ and =
        return Source('', text, split)
    name, _, own = text.partition('@')
    dataset, _, root = name.partition('=')
    if _has_type(dataset):
        return Source(dataset, root or None, own or split, dict(download=True) if download else {})
    return Source('', name, own or split)


def choose(dataset: Dataset, limit: int | None, seed: int) -> list[int] | None:
    """Draw indices of at most limit images, in ascending order; None for the whole dataset, and for a stream."""
    if limit is None or isinstance(dataset, IterableDataset) or limit >= len(dataset):
        return None
    generator = torch.Generator('cpu').manual_seed(seed)
    return torch.randperm(len(dataset), generator=generator, device='cpu')[:limit].sort().values.tolist()


@dataclass
class Images:
    """Batches of images from a source, for one model.

    Attributes:
        source: Source of the images.
        candidate: The model.
        batch_size: Images per batch.
        workers: Processes that load images.
        limit: Maximum number of images, drawn at random; the first images of a stream.
        seed: Seed of the draw.
        labelled: Whether labels are needed.
        reported: Unreadable images that have been reported, shared with the parts of these images.

    Raises:
        UsageError: if there are no images, or if the model does not know their classes.
    """
    source: Source
    candidate: Candidate
    batch_size: int
    workers: int = 0
    limit: int | None = None
    seed: int = 0
    labelled: bool = True
    reported: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        config = self.candidate.data_config
        self.dataset = self.source.open(self.candidate.img_mode)
        self._check_classes()
        self.dataset.transform = create_transform(
            config['input_size'], is_training=False, interpolation=config['interpolation'],
            crop_pct=config['crop_pct'], crop_mode=config.get('crop_mode'), normalize=False)
        self.indices = choose(self.dataset, self.limit, self.seed)

    def _check_classes(self) -> None:
        own, known = dataset_classes(self.dataset), self.candidate.class_to_idx
        if not self.labelled or not own or own == known:
            return
        count = max(own.values()) + 1
        both = f'{self.candidate.name} has {self.candidate.num_classes} classes and {self.source} {count}'
        if known is not None:
            try:
                map_targets(self.dataset, class_mapping(own, known))
            except ValueError as error:
                raise UsageError(f'{both}: labels would not match, for {error}.') from error
            _logger.info(f'{both}: labels are mapped by the names of the classes.')
        elif count != self.candidate.num_classes:
            raise UsageError(f'{both}: labels would not match.')
        else:
            _logger.warning(
                f'{self.candidate.name} holds no class names: only the number of classes is compared with '
                f'{self.source}.')

    def part(self, limit: int) -> 'Images':
        """A random part of these images."""
        part = copy.copy(self)
        part.limit = limit if self.limit is None else min(limit, self.limit)
        part.indices = choose(self.dataset, part.limit, self.seed)
        return part

    def __len__(self) -> int:
        """Number of batches; 0 for a stream of unknown length."""
        try:
            count = len(self.dataset) if self.indices is None else len(self.indices)
        except TypeError:
            return 0
        return -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images (b, c, h, w) in [0, 1] and class indices (b,), which are 0 for images without labels."""
        dataset = self.dataset if self.indices is None else Subset(self.dataset, self.indices)
        seen = 0
        for images, target in self._batches(DataLoader(dataset, self.batch_size, num_workers=self.workers)):
            if not self.labelled:
                target = torch.zeros(len(images), dtype=torch.long, device=images.device)
            if not torch.is_tensor(target) or target.ndim != 1 or target.is_floating_point():
                raise UsageError(f'Data {self.source}: one class for each image is needed.')
            if self.limit is not None:  # a stream has no indices
                images, target = images[:self.limit - seen], target[:self.limit - seen]
            seen += len(images)
            yield images.float() / _HIGHEST_LEVEL, target
            if seen == self.limit:
                break
        self._report_unreadable()

    def _report_unreadable(self) -> None:
        record = unreadable_images(self.dataset)
        found = [] if record is None else record.in_run()
        if set(found) - self.reported:
            self.reported.update(found)
            _logger.warning(
                f'Data {self.source}: {len(found)} images could not be read, the next ones took their place: '
                f'{record.names(found)}')

    def _batches(self, loader: DataLoader) -> Iterator[tuple[torch.Tensor, Any]]:
        batches = batches_of(loader)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # files that are no images, labels of no common kind
                lines = str(error).strip().splitlines() or [type(error).__name__]  # of a worker: with its traceback
                raise UsageError(f'Data {self.source}: {lines[-1]}') from error
            if batch is None:
                return
            yield batch
