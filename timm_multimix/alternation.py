"""Alternation of MultiMix batches with batches of mixed images, as in the papers' experiments (P2, appendix A.1)."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from timm.data import FastCollateMixup, Mixup
from torch.utils.data import Dataset


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
        if not 0 <= self.prob <= 1:
            raise ValueError(f'prob is the probability of a MultiMix batch and must lie in [0, 1], got {self.prob}.')
        if self.start_epoch < 0 or self.off_epoch < 0 or 0 < self.off_epoch <= self.start_epoch:
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
        return np.random.SeedSequence(entropy).generate_state(1)[0] < self.prob * 2 ** 32

    def mixes_images(self, epoch: int, index: int) -> bool:
        """Whether mixup and CutMix apply to batch `index` of an epoch."""
        return self.prob == 1 or not self.is_multimix(epoch, index)


class IndexBatch(list):
    """Dataset indices, or samples, of a batch, with the decision whether its images are mixed."""

    def __init__(self, items: Sequence, mixes_images: bool = True):
        super().__init__(items)
        self.mixes_images = mixes_images


class BatchDataset(Dataset):
    """A dataset that loads a whole batch and keeps the decision that came with its indices."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence) -> IndexBatch:
        return IndexBatch([self.dataset[index] for index in indices], getattr(indices, 'mixes_images', True))


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


def tag_batches(
        batches: Sequence[Sequence],
        schedule: BatchSchedule,
        epoch: int,
        first: int = 0,
) -> Iterator[IndexBatch]:
    """Attach the decision to the index lists of an epoch, from batch `first` on."""
    for index in range(first, len(batches)):
        yield IndexBatch(batches[index], schedule.mixes_images(epoch, index))
