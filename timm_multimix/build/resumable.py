"""Data loader that can resume in the middle of an epoch with the same batches as an uninterrupted run.

The selection of images depends on the random state at the start of the epoch, so batches that were trained on are
skipped without loading them. Augmentation depends on the random state of the worker, or of the main process without
workers. Workers return their random state with every batch, and the workers of a resumed run start from it. An
uninterrupted run draws the same random numbers as with a plain DataLoader, so it sees the same images as timm's script.
"""
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..common.random_state import generator_at, random_state, set_random_state
from ..data.image_files import unreadable_images


@dataclass
class _Report:
    """Worker of a batch and its random state after the batch, both None for the main process.

    Not a tuple, because the pin-memory thread would visit the items of a tuple.
    """
    worker: int | None
    random: dict[str, Any] | None


class _ReportingCollate:
    """Collate function that calls another one and adds a _Report to the batch. It runs in the workers."""

    def __init__(self, collate: Callable):
        self.collate = collate
        self.mixup_enabled = SharedCount(1)

    def __call__(self, samples: Any) -> tuple[Any, _Report]:
        if hasattr(self.collate, 'mixup_enabled'):  # each worker has its own copy, which does not see changes
            self.collate.mixup_enabled = bool(self.mixup_enabled.value)
        is_placeholder = samples is None or (isinstance(samples, list) and not samples)
        batch = None if is_placeholder else self.collate(samples)
        worker = get_worker_info()
        if worker is None:
            return batch, _Report(None, None)
        return batch, _Report(worker.id, random_state())


class _WorkerStart:
    """Worker init function that calls another one, then restores the random state of an interrupted run."""

    def __init__(self, init: Callable | None):
        self.init = init
        self.states: dict[int, dict[str, Any]] = {}

    def __call__(self, worker: int) -> None:
        if self.init is not None:
            self.init(worker)
        if worker in self.states:
            set_random_state(self.states[worker])


class _Batches:
    """Batch sampler that skips the first batches of another one.

    Attributes:
        skip: Number of batches to skip.
        before: Random state to restore after them, or None.
    """

    def __init__(self, batch_sampler: Any, workers: int, device: torch.device | None):
        self.batch_sampler = batch_sampler
        self.workers = workers
        self.device = device
        self.skip = 0
        self.before: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list]:
        batches = list(self.batch_sampler)  # draws the random order before the first image is loaded
        # Empty batches preserve the order of the workers: worker i % workers loads batch i.
        yield from [[]] * (self.skip % self.workers if self.workers else 0)
        if self.before is not None:
            set_random_state(self.before, self.device)
        yield from batches[self.skip:]


class ResumableLoader:
    """DataLoader that saves and restores its position in an epoch with state_dict() and load_state_dict().

    It wraps a DataLoader of timm over a map-style dataset. timm's prefetcher, if used, wraps this loader.

    Args:
        loader: The DataLoader. Its batches are not changed.
        device: Device whose random state is also saved, for a prefetcher that draws random numbers on it.

    Attributes:
        consumed: Number of batches in the epoch that were trained on, counted by advance().
    """

    def __init__(self, loader: DataLoader, device: torch.device | None = None):
        self.dataset, self.sampler, self.batch_sampler = loader.dataset, loader.sampler, loader.batch_sampler
        self.collate_fn = loader.collate_fn
        self.num_workers = loader.num_workers
        self.device = device
        self._collate = _ReportingCollate(loader.collate_fn)
        self._start = _WorkerStart(loader.worker_init_fn)
        self._batches = _Batches(loader.batch_sampler, loader.num_workers, device)
        self._loader = DataLoader(
            loader.dataset,
            batch_sampler=self._batches,
            num_workers=loader.num_workers,
            collate_fn=self._collate,
            pin_memory=loader.pin_memory,
            worker_init_fn=self._start,
            persistent_workers=loader.persistent_workers,
        )
        self._position: dict[str, Any] | None = None
        self._seed: dict[str, Any] | None = None  # random state from which the worker seeds were drawn
        self._workers: dict[int, dict[str, Any]] = {}
        self._unreadable = unreadable_images(loader.dataset)
        # Reports of batches that were not trained on yet, with the random state of the main process before each.
        self._fetched: deque[tuple[dict[str, Any], _Report]] = deque()
        self._epoch_start: dict[str, Any] | None = None
        self.consumed = 0

    @staticmethod
    def can_wrap(loader: Any) -> bool:
        """Return whether a loader is a plain DataLoader over a map-style dataset, with persistent workers or none."""
        return (
            type(loader) is DataLoader
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_sampler is not None
            and (loader.persistent_workers or not loader.num_workers))

    def __len__(self) -> int:
        return len(self._loader)

    def advance(self) -> None:
        """Record that one more batch was trained on."""
        _, report = self._fetched.popleft()
        if report.worker is not None:
            self._workers[report.worker] = report.random
        self.consumed += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was trained on. Later batches may already be fetched."""
        return dict(
            consumed=self.consumed,
            epoch_start=self._epoch_start,
            # A fetched batch has to be made again: `before` is the state before it, `now` the state to continue from.
            before=self._fetched[0][0] if self._fetched else None,
            now=random_state(self.device),
            seed=self._seed,
            workers=dict(self._workers),
            unreadable=[] if self._unreadable is None else self._unreadable.in_epoch(),
        )

    def load_state_dict(self, state: dict[str, Any], *, same_workers: bool, in_epoch: bool) -> None:
        """Restore a position. It takes effect in the next iteration.

        Args:
            state: Result of state_dict().
            same_workers: Whether the number of workers is unchanged. Only then are their random states restored.
            in_epoch: Continue in the middle of the epoch instead of starting a new one.
        """
        if same_workers:
            self._seed = state['seed']
            self._workers = dict(state['workers'])
            self._start.states = dict(state['workers'])
        self._position = dict(state) if in_epoch else None
        self.consumed = state['consumed'] if in_epoch else 0
        unreadable = state.get('unreadable')
        if in_epoch and self._unreadable is not None and isinstance(unreadable, list):  # a number in version 0.1
            self._unreadable.update(unreadable)

    def _draw_seed(self) -> None:
        """Draw the seed of the workers like DataLoader, from a saved state so that a resumed run draws it again."""
        if self._seed is None:
            self._seed = random_state()
            torch.empty((), dtype=torch.int64).random_()
        self._loader.generator = generator_at(self._seed)

    def __iter__(self) -> Iterator[Any]:
        position, self._position = self._position, None
        after = None
        self.consumed, self._batches.skip, self._batches.before = 0, 0, None
        self._fetched.clear()
        if position is not None:
            after = position['now'] if position['before'] is not None else None
            set_random_state(position['epoch_start'], self.device)
            self.consumed = self._batches.skip = position['consumed']
            self._batches.before = position['before'] or position['now']
        if self.num_workers:
            self._draw_seed()
        self._epoch_start = random_state(self.device)
        self._collate.mixup_enabled.value = int(getattr(self.collate_fn, 'mixup_enabled', True))
        batches = iter(self._loader)
        while True:
            before = random_state(self.device)
            batch, report = next(batches, (None, None))
            if report is None:
                break
            if batch is None:  # placeholder
                continue
            self._fetched.append((before, report))
            yield batch
            if after is not None:  # the fetched batch was made again
                set_random_state(after, self.device)
                after = None
