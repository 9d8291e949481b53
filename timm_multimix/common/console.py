"""Console output of a run: logging, running averages and the progress of an epoch."""
import logging
import sys
import threading
import time
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from timm.utils.distributed import world_info_from_env
from tqdm import tqdm

from .secrets import redact

_logger = logging.getLogger(__name__)

MAX_PENDING_VALUES = 4096


class _LineFormatter(logging.Formatter):
    """Format log records: level except for INFO, rank for errors of distributed runs, access tokens redacted."""

    def format(self, record: logging.LogRecord) -> str:
        text = redact(super().format(record))
        _, rank, world_size = world_info_from_env()
        if record.levelno >= logging.ERROR and world_size > 1:
            text = f'[rank {rank} of {world_size}] {text}'
        return text if record.levelno == logging.INFO else f'{record.levelname}: {text}'


class _ConsoleHandler(logging.Handler):
    """Write log lines above the progress bar. One write each, so that lines of workers do not run into each other."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f'{self.format(record)}\n', file=sys.stderr, end='')


def is_first_on_machine() -> bool:
    """Return whether this is the first process on this machine (local rank 0)."""
    return world_info_from_env()[0] == 0


def setup_logging() -> None:
    """Log to stderr. Processes other than the first one log only errors."""
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared with workers, and lost if one is killed that holds it
    handler = _ConsoleHandler()
    handler.setFormatter(_LineFormatter())
    logging.root.handlers[:] = [handler]
    is_primary = world_info_from_env()[1] == 0
    logging.root.setLevel(logging.INFO if is_primary else logging.ERROR)
    if not is_primary:
        warnings.simplefilter('ignore')  # all processes get the same warnings
    # Checkpoint lists after every epoch, repeated information, and URLs that contain short-lived credentials.
    for name in ('timm.utils.checkpoint_saver', 'timm.task._helpers', 'httpx', 'httpx2'):
        logging.getLogger(name).setLevel(logging.WARNING)


class Averages:
    """Running averages of scalars in float64, weighted by the number of examples.

    The values stay on their device until the averages are read, so that a training step does not wait for the device.
    The sums are computed on the CPU, because MPS does not support float64.

    Args:
        device: Device of the scalars.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.latest: dict[str, torch.Tensor] = {}
        self._pending: list[tuple[str, torch.Tensor, int]] = []

    def update(self, values: Mapping[str, torch.Tensor], count: int) -> None:
        """Add the mean values of a batch of `count` examples. Values with a count of 0 are ignored."""
        for name, value in values.items():
            self.sums.setdefault(name, 0.0)  # even without examples, because all processes need the same names
            self.counts[name] = self.counts.get(name, 0) + count
            if count:
                self.latest[name] = value.detach()
                self._pending.append((name, value.detach(), count))
        if len(self._pending) >= MAX_PENDING_VALUES:
            self._add_pending()

    def _add_pending(self) -> None:
        if self._pending:
            numbers = torch.stack([value.float() for _, value, _ in self._pending]).tolist()
            for (name, _, count), number in zip(self._pending, numbers, strict=True):
                self.sums[name] += number * count
            self._pending.clear()

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the sums and counts."""
        self._add_pending()
        return dict(sums=dict(self.sums), counts=dict(self.counts))

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Restore the sums and counts of state_dict()."""
        self._pending.clear()
        self.sums = dict(state['sums'])
        self.counts = dict(state['counts'])

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """Return the averages, over all processes if distributed."""
        self._add_pending()
        totals, counts = list(self.sums.values()), list(self.counts.values())
        if distributed and totals:
            dtype = torch.float32 if self.device.type == 'mps' else torch.float64
            table = torch.tensor([totals, counts], dtype=dtype, device=self.device)
            dist.all_reduce(table)
            totals, counts = table.tolist()
        return {name: total / count for name, total, count in zip(self.sums, totals, counts, strict=True) if count}


class EpochReporter:
    """Report the progress of a training epoch: a progress bar on a terminal, otherwise log lines in timm's format.

    `interval` is the number of updates between reports, `done` the number of updates before a resume.
    """

    def __init__(self, epoch: int, num_updates: int, interval: int, world_size: int, done: int = 0):
        self.epoch = epoch
        self.num_updates = num_updates
        self.interval = interval
        self.world_size = world_size
        self.images = self.total_images = 0
        self.updates = 0
        self.data_time = 0.0
        self.started = self.window_started = time.perf_counter()
        self.bar = tqdm(
            total=num_updates, initial=done, desc=f'Epoch {epoch}', leave=False, dynamic_ncols=True, file=sys.stderr,
            bar_format='{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]',
            disable=None if logging.root.isEnabledFor(logging.INFO) else True)  # None: off unless on a terminal

    def add(self, num_images: int, data_time: float) -> None:
        """Count a batch, and the time spent waiting for it."""
        self.images += num_images * self.world_size
        self.total_images += num_images * self.world_size
        self.data_time += data_time

    def is_due(self, update: int) -> bool:
        """Return whether to report after this update, counted from 0 in the epoch."""
        return update % self.interval == 0 or update == self.num_updates - 1

    def step(self) -> None:
        """Count an update."""
        self.updates += 1
        self.bar.update()

    def report(self, update: int, latest: Mapping[str, float], averages: Mapping[str, float], lr: float) -> None:
        """Report the latest loss, the averages, the speed and the learning rate after an update."""
        elapsed = time.perf_counter() - self.window_started
        speed = self.images / elapsed
        if not self.bar.disable:
            values = [f'{name} {value:#.3g}' for name, value in averages.items()]
            self.bar.set_postfix_str(', '.join([*values, f'{speed:.0f} images/s', f'lr {lr:.1e}']))
        else:
            updates = max(self.updates, 1)
            parts = [f'Loss: {latest["loss"]:#.3g} ({averages["loss"]:#.3g})']
            parts += [f'{name}: {value:#.3g}' for name, value in averages.items() if name not in ('loss', 'top1')]
            parts += [f'Acc@1: {averages["top1"]:.2f}'] if 'top1' in averages else []
            parts += [f'Time: {elapsed / updates:.3f}s, {speed:.1f}/s', f'LR: {lr:.3e}']
            parts += [f'Data: {self.data_time / updates:.3f}']
            percent = 100 * (update + 1) / self.num_updates
            _logger.info(
                f'Train: {self.epoch} [{update:>4d}/{self.num_updates} ({percent:>3.0f}%)]  ' + '  '.join(parts))
        self.images = self.updates = 0
        self.data_time = 0.0
        self.window_started = time.perf_counter()

    def close(self) -> float:
        """Remove the progress bar. Return the mean images per second of the epoch."""
        self.bar.close()
        return self.total_images / max(time.perf_counter() - self.started, 1e-9)
