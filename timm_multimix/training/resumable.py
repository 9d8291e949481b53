"""A loader that can go on in the middle of an epoch, exactly.

Two things are random about a batch: which images are in it, and how they are augmented. The first follows from the
random state in which the epoch began, so the batches that were trained on are skipped without loading them. The second
follows from the random state of the worker that made the batch (of the process itself without workers): workers tell it
with every batch, a resumed run's workers begin with it. An uninterrupted run draws what it would draw from the plain
loader: timm's script and this one see the same images.
"""
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..common.random_state import generator_at, random_state, set_random_state
from ..data.image_files import unreadable_images


@dataclass
class _Report:
    """What a batch says about its making; no tuple, whose items a pinning thread would visit one by one.

    Attributes:
        worker: Number of the worker, None for the process itself.
        random: The worker's random state after the batch.
    """
    worker: int | None
    random: dict[str, Any] | None


class _Fetched(NamedTuple):
    """A batch that was fetched but not trained on yet: the state of the process before, and the batch's report."""
    before: dict[str, Any]
    report: _Report


class _ReportingCollate:
    """Makes a batch as another collate function does, and adds a report. Runs in the workers."""

    def __init__(self, collate: Callable):
        self.collate = collate
        self.mixup_enabled = SharedCount(1)

    def __call__(self, samples: Any) -> tuple[Any, _Report]:
        if hasattr(self.collate, 'mixup_enabled'):  # a worker's copy would never hear that mixup ended
            self.collate.mixup_enabled = bool(self.mixup_enabled.value)
        is_placeholder = samples is None or (isinstance(samples, list) and not samples)
        batch = None if is_placeholder else self.collate(samples)
        worker = get_worker_info()
        if worker is None:
            return batch, _Report(None, None)
        return batch, _Report(worker.id, random_state())


class _WorkerStart:
    """Starts a worker as timm does, then puts it where an interrupted run left it."""

    def __init__(self, init: Callable | None):
        self.init = init
        self.states: dict[int, dict[str, Any]] = {}

    def __call__(self, worker: int) -> None:
        if self.init is not None:
            self.init(worker)
        if worker in self.states:
            set_random_state(self.states[worker])


class _Skip:
    """How an iteration begins in the middle: batches to leave out, and the random state to go on with."""

    def __init__(self, workers: int):
        self.workers = workers
        self.count = 0
        self.before: dict[str, Any] | None = None
        self.device: torch.device | None = None

    @property
    def placeholders(self) -> int:
        """Empty batches that keep the turns of the workers: batch i is always made by worker i modulo their number."""
        return self.count % self.workers if self.workers else 0


class _Batches:
    """The batches of a batch sampler, as lists of indices, from a place in the epoch on."""

    def __init__(self, batch_sampler, skip: _Skip):
        self.batch_sampler = batch_sampler
        self.skip = skip

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list]:
        batches = list(self.batch_sampler)  # now: whatever is random about the order is drawn before the first image
        skip = self.skip
        yield from [[]] * skip.placeholders
        if skip.before is not None:
            set_random_state(skip.before, skip.device)
        yield from batches[skip.count:]


class ResumableLoader:
    """A DataLoader with a place: state_dict() says where it is, load_state_dict() goes there.

    Wraps one of timm's DataLoaders over a dataset with indices, inside of timm's prefetcher if there is one.

    Args:
        loader: The loader. What it yields is unchanged.
        device: Device whose random state counts too, where the prefetcher draws on it.

    Attributes:
        consumed: Batches of the epoch that were trained on, as told by advance().
    """

    def __init__(self, loader: DataLoader, device: torch.device | None = None):
        if not self.can_wrap(loader):
            raise ValueError('A resumable loader needs a dataset with indices, and workers that live as long as it.')
        self.dataset, self.sampler, self.batch_sampler = loader.dataset, loader.sampler, loader.batch_sampler
        self.collate_fn = loader.collate_fn
        self.num_workers = loader.num_workers
        self.device = device
        self._collate = _ReportingCollate(loader.collate_fn)
        self._start = _WorkerStart(loader.worker_init_fn)
        self._skip = _Skip(loader.num_workers)
        self._loader = DataLoader(
            loader.dataset,
            batch_sampler=_Batches(loader.batch_sampler, self._skip),
            num_workers=loader.num_workers,
            collate_fn=self._collate,
            pin_memory=loader.pin_memory,
            worker_init_fn=self._start,
            persistent_workers=loader.persistent_workers,
        )
        self._place: dict[str, Any] | None = None
        self._seed: dict[str, Any] | None = None  # random state that the workers' seeds were drawn from
        self._workers: dict[int, dict[str, Any]] = {}
        self._unreadable = unreadable_images(loader.dataset)
        self._fetched: deque[_Fetched] = deque()
        self._epoch_start: dict[str, Any] | None = None
        self.consumed = 0

    @staticmethod
    def can_wrap(loader: Any) -> bool:
        """Whether a loader's place can be known: no stream, no workers that begin anew or ahead of an epoch."""
        return (
            type(loader) is DataLoader
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_sampler is not None
            and (loader.persistent_workers or not loader.num_workers))

    def __len__(self) -> int:
        return len(self._loader)

    def advance(self) -> None:
        """Say that one more batch was trained on."""
        report = self._fetched.popleft().report
        if report.worker is not None:
            self._workers[report.worker] = report.random
        self.consumed += 1

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: between the batches trained on and those that are fetched already."""
        return dict(
            consumed=self.consumed,
            epoch_start=self._epoch_start,
            # Of a batch that was made already and has to be made again, and of the run after it was made.
            before=self._fetched[0].before if self._fetched else None,
            now=random_state(self.device),
            seed=self._seed,
            workers=dict(self._workers),
            unreadable=[] if self._unreadable is None else self._unreadable.in_epoch(),
        )

    def load_state_dict(self, state: dict[str, Any], *, same_workers: bool, in_epoch: bool) -> None:
        """Go on from a place, with the next iteration.

        Args:
            state: From state_dict.
            same_workers: Whether there are as many workers as there were: only then their random states fit.
            in_epoch: Go on in the middle of the epoch; else begin a new one.
        """
        if same_workers:
            self._seed = state['seed']
            self._workers = dict(state['workers'])
            self._start.states = dict(state['workers'])
        self._place = dict(state) if in_epoch else None
        earlier = state.get('unreadable')
        if in_epoch and self._unreadable is not None and isinstance(earlier, list):
            self._unreadable.update(earlier)

    def _draw_seed(self) -> None:
        """Draw the seed of the workers as the DataLoader would, from a copy that it can be drawn from again."""
        if self._seed is None:
            self._seed = random_state()
            torch.empty((), dtype=torch.int64).random_()
        self._loader.generator = generator_at(self._seed)

    def __iter__(self) -> Iterator[Any]:
        place, self._place = self._place, None
        after = None
        self.consumed, self._skip.count, self._skip.before, self._skip.device = 0, 0, None, self.device
        self._fetched.clear()
        if place is not None:
            after = place['now'] if place['before'] is not None else None
            set_random_state(place['epoch_start'], self.device)
            self.consumed = self._skip.count = place['consumed']
            self._skip.before = place['before'] or place['now']
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
            self._fetched.append(_Fetched(before, report))
            yield batch
            if after is not None:  # the batch that was on its way is so again: go on from where the run was
                set_random_state(after, self.device)
                after = None
