"""Alternation of MultiMix batches with batches of mixed images, as in the papers' experiments (P2, appendix A.1)."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from timm.data import FastCollateMixup, Mixup
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset


@dataclass(frozen=True)
class BatchSchedule:
    """Decides which mini-batches are MultiMix batches.

    The decision is a function of seed, epoch and batch index. It is the same in every process and after a resume.

    Args:
        prob: Probability of a MultiMix batch. With 1 every batch is one, and image mixing applies to every batch. Below
            1 the images of MultiMix batches are not mixed, and all other batches are trained without MultiMix.
        seed: Seed of the decisions.
        start_epoch: First epoch with MultiMix batches, counted from 0.
        off_epoch: First epoch without MultiMix batches again; 0 means never.

    Raises:
        ValueError: if prob is not a probability, or no epoch is left for MultiMix.
    """
    prob: float = 1.0
    seed: int = 0
    start_epoch: int = 0
    off_epoch: int = 0

    def __post_init__(self):
        if not isinstance(self.prob, (int, float)) or not 0 <= self.prob <= 1:
            raise ValueError(f'prob is the probability of a MultiMix batch and must lie in [0, 1], got {self.prob!r}.')
        for name in ('start_epoch', 'off_epoch'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name} must be 0 or more, got {getattr(self, name)}.')
        if 0 < self.off_epoch <= self.start_epoch:
            raise ValueError(
                'MultiMix is on from start_epoch until off_epoch (0 for never): '
                f'start_epoch={self.start_epoch} and off_epoch={self.off_epoch} leave no epoch to it.')

    @property
    def alternates(self) -> bool:
        """Whether both kinds of batches occur."""
        return 0 < self.prob < 1

    def is_active(self, epoch: int) -> bool:
        """Whether an epoch can have MultiMix batches."""
        ended = self.off_epoch and epoch >= self.off_epoch
        return self.prob > 0 and epoch >= self.start_epoch and not ended

    def is_multimix(self, epoch: int, index: int) -> bool:
        """Whether batch `index` of an epoch is a MultiMix batch."""
        if not self.is_active(epoch):
            return False
        if not self.alternates:
            return True
        entropy = (self.seed % 2 ** 64, epoch, index)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0]) < self.prob * 2 ** 32

    def mixes_images(self, epoch: int, index: int) -> bool:
        """Whether mixup and CutMix apply to batch `index` of an epoch."""
        return self.prob == 1 or not self.is_multimix(epoch, index)


class _Batch(list):
    """Dataset indices, or samples, of a batch, with the decision whether its images are mixed."""

    def __init__(self, items: Iterable, mixes_images: bool):
        super().__init__(items)
        self.mixes_images = mixes_images


class _BatchDataset(Dataset):
    """A dataset that loads a batch as a whole, so that the decision stays with it."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence) -> list:
        samples = [self.dataset[index] for index in indices]
        return _Batch(samples, indices.mixes_images) if isinstance(indices, _Batch) else samples

    def set_epoch(self, epoch: int) -> None:
        _set_epoch(self.dataset, epoch)


class _DecidingBatchSampler:
    """A batch sampler that attaches the decision of a BatchSchedule to every batch of indices."""

    def __init__(self, batch_sampler: Any, schedule: BatchSchedule):
        self.batch_sampler = batch_sampler
        self.schedule = schedule
        self.epoch = 0

    def __getattr__(self, name: str) -> Any:  # such as average_batch_size of timm's ScheduledBatchSampler
        return getattr(self.__dict__['batch_sampler'], name)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[_Batch]:
        for index, indices in enumerate(self.batch_sampler):
            yield _Batch(indices, self.schedule.mixes_images(self.epoch, index))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        _set_epoch(self.batch_sampler, epoch)
        _set_epoch(getattr(self.batch_sampler, 'sampler', None), epoch)


def _set_epoch(part: Any, epoch: int) -> None:
    if hasattr(part, 'set_epoch'):
        part.set_epoch(epoch)


def alternate(loader: PrefetchLoader, schedule: BatchSchedule) -> None:
    """Let a loader that mixes images in its collate function leave out those of MultiMix batches.

    Call it before the first batch. The loader's batch sampler then needs set_epoch() before every epoch.

    Args:
        loader: Training loader of timm's create_loader with collate_fn=AlternatingCollateMixup(...).
        schedule: Decides which batches are MultiMix batches.

    Raises:
        TypeError: if the loader does not know the index of a batch, as with a streamed dataset.
    """
    inner = loader.loader
    if type(inner) is not DataLoader or isinstance(inner.dataset, IterableDataset):
        kind = type(inner.dataset if type(inner) is DataLoader else inner).__name__
        raise TypeError(
            f'With a probability between 0 and 1 the index of a batch must be known where its images are mixed, and '
            f'{kind} does not know it.')
    loader.loader = DataLoader(
        _BatchDataset(inner.dataset),
        batch_sampler=_DecidingBatchSampler(inner.batch_sampler, schedule),
        num_workers=inner.num_workers,
        collate_fn=inner.collate_fn,
        pin_memory=inner.pin_memory,
        worker_init_fn=inner.worker_init_fn,
        persistent_workers=inner.persistent_workers,
    )


class AlternatingCollateMixup(FastCollateMixup):
    """timm's FastCollateMixup that leaves the images of MultiMix batches as they are. Targets are soft either way."""

    def __call__(self, batch: Sequence, _=None):
        enabled = self.mixup_enabled
        self.mixup_enabled = enabled and getattr(batch, 'mixes_images', True)
        try:
            return super().__call__(batch)
        finally:
            self.mixup_enabled = enabled


class AlternatingMixup(Mixup):
    """timm's Mixup that leaves the images of MultiMix batches as they are. Targets are soft either way.

    Attributes:
        mixes_images: Whether the next batch is mixed; set by whoever iterates over the loader.
    """

    mixes_images = True

    def __call__(self, x, target):
        enabled = self.mixup_enabled
        self.mixup_enabled = enabled and self.mixes_images
        try:
            return super().__call__(x, target)
        finally:
            self.mixup_enabled = enabled
