"""Images to evaluate on, resized and cropped like the validation images of each model, in [0, 1]."""
import argparse
import copy
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from tqdm import tqdm

from ..common.command_line import check_dataset_packages
from ..common.errors import UsageError, near_names, printable, usage_errors
from ..data.class_names import class_mapping, dataset_classes, map_targets
from ..data.dataset_types import DATASET_TYPES, NEED_FOLDER, dataset_prefix
from ..data.demo import DEMO_PREFIX, DEMOS, create_dataset
from ..data.image_files import unreadable_images
from ..data.loading import batches_of
from .models import Candidate
from .ood import NOISES
from .robustness import PIXEL_LEVELS

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Split of a dataset, named as for --dataset of `timm-multimix train`, or of a folder if `dataset` is ''.

    `options` are further arguments of timm's create_dataset.
    """
    dataset: str
    root: str | None
    split: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return printable(f'{self.dataset or self.root} ({self.split})')

    def open(self, img_mode: str) -> Dataset:
        """Open the dataset with images of a PIL mode.

        Raises:
            UsageError: if there is no such folder, dataset or split, or if a package that reads the dataset is missing.
        """
        if not _has_type(self.dataset) and not os.path.exists(self.root or ''):
            name = self.dataset or self.root
            hint = near_names(name, (*DEMOS, *NOISES)) or near_names(name.partition('/')[0], DATASET_TYPES)
            raise UsageError(
                f'Data {self}: no such folder or dataset.{hint} Datasets are {", ".join(DEMOS)} and '
                f'{"/NAME, ".join(DATASET_TYPES)}/NAME.')
        check_dataset_packages('Data', self.dataset)
        if self.root is None and dataset_prefix(self.dataset) in NEED_FOLDER:
            raise UsageError(
                f'Data {self} is read from a folder. Specify it with --data-dir, or as NAME=FOLDER in --ood.')
        with usage_errors(f'Data {self}'):
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
    """Draw indices of at most `limit` images, in ascending order; None for the whole dataset, and for a stream."""
    if limit is None or isinstance(dataset, IterableDataset) or limit >= len(dataset):
        return None
    generator = torch.Generator('cpu').manual_seed(seed)
    return torch.randperm(len(dataset), generator=generator, device='cpu')[:limit].sort().values.tolist()


@dataclass
class Images:
    """Batches of images from a source, for one model.

    Attributes:
        args: Options of the command: batch_size, workers and seed.
        limit: Maximum number of images, drawn at random. A stream is truncated.
        labeled: Whether labels are needed.

    Raises:
        UsageError: if there are no images, or if the model does not have their classes.
    """
    source: Source
    candidate: Candidate
    args: argparse.Namespace
    limit: int | None = None
    labeled: bool = True

    def __post_init__(self) -> None:
        config = self.candidate.data_config
        self.dataset = self.source.open(self.candidate.img_mode)
        if self.labeled:
            self._match_classes()
        self.dataset.transform = create_transform(
            config['input_size'], is_training=False, interpolation=config['interpolation'],
            crop_pct=config['crop_pct'], crop_mode=config.get('crop_mode'), normalize=False)
        self.indices = choose(self.dataset, self.limit, self.args.seed)

    def _match_classes(self) -> None:
        own, known = dataset_classes(self.dataset), self.candidate.class_to_idx
        if not own or own == known:
            return
        count, num_classes = max(own.values()) + 1, self.candidate.model.num_classes
        both = f'{self.candidate.name} has {num_classes} classes and {self.source} {count}'
        if known is not None:
            try:
                map_targets(self.dataset, class_mapping(own, known))
            except ValueError as error:
                raise UsageError(f'{both}. Labels would not match: {error}.') from error
            _logger.info(f'{both}. Labels are mapped by class name.')
        elif count != num_classes:
            raise UsageError(f'{both}. Labels would not match.')
        else:
            _logger.warning(
                f'{self.candidate.name} contains no class names: only the number of classes is compared with '
                f'{self.source}.')

    def part(self, limit: int) -> 'Images':
        """Return a random part of these images."""
        part = copy.copy(self)
        part.limit = limit if self.limit is None else min(limit, self.limit)
        part.indices = choose(self.dataset, part.limit, self.args.seed)
        return part

    def __len__(self) -> int:
        """Return the number of batches, 0 for a stream of unknown length."""
        count = len(self.dataset) if self.indices is None else len(self.indices)
        return -(-count // self.args.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images (b, c, h, w) in [0, 1] and class indices (b,), which are 0 for images without labels."""
        dataset = self.dataset if self.indices is None else Subset(self.dataset, self.indices)
        seen = 0
        try:
            for images, target in batches_of(
                    DataLoader(dataset, self.args.batch_size, num_workers=self.args.workers)):
                if not self.labeled:
                    target = torch.zeros(len(images), dtype=torch.long, device=images.device)
                if not torch.is_tensor(target) or target.ndim != 1 or target.is_floating_point():
                    raise ValueError('one class for each image is needed.')
                if self.limit is not None:  # a stream has no indices
                    images, target = images[:self.limit - seen], target[:self.limit - seen]
                seen += len(images)
                yield images.float() / PIXEL_LEVELS, target
                if seen == self.limit:
                    break
        except Exception as error:  # readers and decoders raise exceptions of many types
            lines = str(error).strip().splitlines() or [type(error).__name__]  # a worker's message contains a traceback
            raise UsageError(f'Data {self.source}: {lines[-1]}') from error


def progress(batches: Iterable, description: str) -> Iterator:
    """Iterate over batches, with a progress bar on a terminal."""
    return tqdm(batches, desc=description, leave=False, disable=None, dynamic_ncols=True)


@torch.no_grad()
def predict(candidate: Candidate, batches: Iterable, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (n, c) and targets (n,) of batches of images, on the CPU. Log unreadable images.

    Raises:
        UsageError: if there are no images, or if logits are not finite.
    """
    device = next(candidate.model.parameters()).device
    name = f'{candidate.name}: {what}'
    outputs, targets = [], []
    for images, target in progress(batches, name):
        outputs.append(candidate(images.to(device)).float().cpu())
        targets.append(target)
    if not outputs:
        raise UsageError(f'{name}: there are no images.')
    record = unreadable_images(getattr(batches, 'dataset', None))
    if record is not None and (indices := record.in_run()):
        _logger.warning(
            f'{name}: {len(indices)} images could not be read and were replaced by the next images: '
            f'{record.names(indices)}')
    logits = torch.cat(outputs)
    if bad := int((~logits.isfinite().all(1)).sum()):
        raise UsageError(
            f'{name}: the outputs for {bad} of {len(logits)} images are not finite. The model diverged, or its weights '
            'are damaged.')
    return logits, torch.cat(targets)
