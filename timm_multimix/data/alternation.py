"""Alternation of MultiMix batches and batches with image mixing, as in the papers (P2, appendix A.1)."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from timm.data import FastCollateMixup, Mixup
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset


@dataclass(frozen=True)
class BatchSchedule:
    """Schedule that selects the MultiMix batches.

    The selection depends only on seed, epoch and batch index. It is the same in every process and after a resume.

    Args:
        prob: Probability of a MultiMix batch. Below 1, image mixing applies to the other batches only, which are
            trained without MultiMix. With 1 there are no others, and image mixing applies to every batch.
        seed: Seed of the selection.
        start_epoch: First epoch with MultiMix batches, counted from 0.
        off_epoch: First epoch without MultiMix batches after start_epoch; 0 means never.

    Raises:
        ValueError: if prob is not a probability, an epoch is negative, or no epoch has MultiMix batches.
    """
    prob: float = 1.0
    seed: int = 0
    start_epoch: int = 0
    off_epoch: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.prob, (int, float)) or not 0 <= self.prob <= 1:
            raise ValueError(f'prob is the probability of a MultiMix batch and must be in [0, 1], got {self.prob!r}.')
        for name in ('start_epoch', 'off_epoch'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name} must be 0 or more, got {getattr(self, name)}.')
        if 0 < self.off_epoch <= self.start_epoch:
            raise ValueError(
                f'start_epoch={self.start_epoch} and off_epoch={self.off_epoch} leave no epoch for MultiMix. '
                'off_epoch must be 0 (never) or greater than start_epoch.')

    @property
    def alternates(self) -> bool:
        """Whether both types of batches occur."""
        return 0 < self.prob < 1

    def is_active(self, epoch: int) -> bool:
        """Return whether an epoch can have MultiMix batches."""
        ended = self.off_epoch and epoch >= self.off_epoch
        return self.prob > 0 and epoch >= self.start_epoch and not ended

    def is_multimix(self, epoch: int, index: int) -> bool:
        """Return whether batch `index` of an epoch is a MultiMix batch."""
        if not self.is_active(epoch):
            return False
        if not self.alternates:
            return True
        entropy = (self.seed % 2 ** 64, epoch, index)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0]) < self.prob * 2 ** 32

    def mixes_images(self, epoch: int, index: int) -> bool:
        """Return whether mixup and CutMix apply to batch `index` of an epoch."""
        return self.prob == 1 or not self.is_multimix(epoch, index)


class _Batch(list):
    """Dataset indices or samples of a batch, with a flag for image mixing."""

    def __init__(self, items: Iterable, mixes_images: bool):
        super().__init__(items)
        self.mixes_images = mixes_images


class _BatchDataset(Dataset):
    """Dataset that loads whole batches and preserves their flag for image mixing."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence) -> list:
        samples = [self.dataset[index] for index in indices]
        return _Batch(samples, indices.mixes_images) if isinstance(indices, _Batch) else samples


class _DecidingBatchSampler:
    """Batch sampler that adds the flag for image mixing to every batch of indices."""

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
        for part in (self.batch_sampler, self.batch_sampler.sampler):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)


def alternate(loader: PrefetchLoader, schedule: BatchSchedule) -> None:
    """Disable image mixing in the collate function of a loader for MultiMix batches.

    The loader was created with collate_fn=AlternatingCollateMixup(...), and no batch was loaded yet. Call set_epoch()
    of the loader's batch sampler before every epoch.

    Raises:
        TypeError: if the loader does not provide the index of a batch, as with an iterable dataset.
    """
    inner = loader.loader
    if type(inner) is not DataLoader or isinstance(inner.dataset, IterableDataset):
        kind = type(inner.dataset if type(inner) is DataLoader else inner).__name__
        raise TypeError(
            'A MultiMix probability between 0 and 1 needs the index of each batch in the collate function, which '
            f'{kind} does not provide.')
    names = ('num_workers', 'collate_fn', 'pin_memory', 'worker_init_fn', 'persistent_workers')
    loader.loader = DataLoader(
        _BatchDataset(inner.dataset), batch_sampler=_DecidingBatchSampler(inner.batch_sampler, schedule),
        **{name: getattr(inner, name) for name in names})


class AlternatingCollateMixup(FastCollateMixup):
    """timm's FastCollateMixup without image mixing for MultiMix batches. The targets of all batches are soft."""

    def __call__(self, batch: Sequence, _: Any = None) -> Any:
        enabled = self.mixup_enabled
        self.mixup_enabled = enabled and getattr(batch, 'mixes_images', True)
        try:
            return super().__call__(batch)
        finally:
            self.mixup_enabled = enabled


class AlternatingMixup(Mixup):
    """timm's Mixup without image mixing for MultiMix batches. The targets of all batches are soft.

    Attributes:
        mixes_images: Whether the images of the next batch are mixed. The training loop sets it.
    """

    mixes_images = True

    def __call__(self, x: Any, target: Any) -> Any:
        enabled = self.mixup_enabled
        self.mixup_enabled = enabled and self.mixes_images
        try:
            return super().__call__(x, target)
        finally:
            self.mixup_enabled = enabled
