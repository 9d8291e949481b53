"""Distributed setup: process group, timeouts, and the error raised when another process stops responding."""
import argparse
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device, is_distributed_env, world_info_from_env

from .errors import RunError

_logger = logging.getLogger(__name__)


def choose_device(args: argparse.Namespace) -> torch.device:
    """Select the device of this process, as timm's init_distributed_device does, without creating the process group.

    Sets distributed, world_size, rank, local_rank and device of the arguments, as timm does.
    """
    if not is_distributed_env():
        return init_distributed_device(args)
    args.distributed = True
    args.local_rank, args.rank, args.world_size = world_info_from_env()
    kind = torch.device(args.device).type
    if kind != 'cpu':
        args.device = f'{kind}:{args.local_rank}'
        torch.get_device_module(kind).set_device(args.local_rank)
    return torch.device(args.device)


def join_processes(device: torch.device, rank: int, world_size: int, timeout: float) -> None:
    """Initialize the process group, with a timeout in seconds. This works after a restart by torchrun too."""
    timeout = timedelta(seconds=timeout)
    store, *_ = next(dist.rendezvous('env://', rank, world_size, timeout=timeout))
    # torchrun may keep its store over restarts. The prefix hides the addresses of the previous processes.
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    dist.init_process_group(
        dist.Backend.default_device_backend_map.get(device.type, 'gloo'),
        store=dist.PrefixStore(f'attempt {attempt}', store), rank=rank, world_size=world_size, timeout=timeout)


def of_the_first(value: Any) -> Any:
    """Broadcast a value from the first process and return it."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class Watchdog:
    """Records the current place in the run and logs an error if it does not change for too long.

    A thread logs the error before --dist-timeout, because PyTorch aborts the process without a Python exception when
    a collective on a GPU times out.
    """

    def __init__(self) -> None:
        self.place = 'preparing'  # later for example 'epoch 1, update 7'
        self._since = time.monotonic()
        self._ended = threading.Event()

    def move(self, place: str) -> None:
        """Record a new place in the run."""
        self.place = place
        self._since = time.monotonic()

    def watch(self, patience: float) -> None:
        """Start a thread that logs an error if the place does not change for `patience` seconds."""
        threading.Thread(target=self._watch, args=(patience,), daemon=True).start()

    def end(self) -> None:
        """Stop the thread."""
        self._ended.set()

    def _watch(self, patience: float) -> None:
        stuck = 0.0
        while stuck <= patience:
            if self._ended.wait(patience / 20):
                return
            stuck = time.monotonic() - self._since
        _logger.error(f'No progress for {stuck:.0f} s in {self.place}. Another process may have stopped.')


@contextmanager
def lost_contact_errors(watchdog: Watchdog, timeout: float) -> Iterator[None]:
    """Convert PyTorch's error that another process does not respond to a RunError with the place in the run."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and 'gloo' not in str(error):  # gloo raises plain RuntimeErrors
            raise
        raise RunError(
            f'Lost contact with the other processes in {watchdog.place} (--dist-timeout {timeout:g} seconds). See '
            f'their logs. {error}') from error
