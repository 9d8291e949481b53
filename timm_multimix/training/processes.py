"""Several processes: how long they wait for each other, and what one tells that waits in vain."""
import argparse
import logging
import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device, is_distributed_env, world_info_from_env

from ..common.errors import RunError

_logger = logging.getLogger(__name__)


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device of this process. Does what timm's init_distributed_device does, except to join the other processes.

    Args:
        args: Arguments of the run. Gets timm's distributed, world_size, rank, local_rank and device.
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
    """Make the process group, also where torchrun has started the processes again.

    Args:
        device: The device of this process.
        rank: Its rank.
        world_size: Number of processes.
        timeout: Seconds that they wait for each other, now and in every collective.
    """
    timeout = timedelta(seconds=timeout)
    store, *_ = next(dist.rendezvous('env://', rank, world_size, timeout=timeout))
    # torchrun may keep its store when it starts processes again: they must not find the addresses of those that died.
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    dist.init_process_group(
        dist.Backend.default_device_backend_map.get(device.type, 'gloo'),
        store=dist.PrefixStore(f'attempt {attempt}', store), rank=rank, world_size=world_size, timeout=timeout)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error says that other processes do not answer. That of gloo has no type of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and 'gloo' in str(error))


def lost_contact(error: BaseException, place: str, timeout: float) -> RunError:
    """What to tell where is_lost_contact(error)."""
    return RunError(
        f'Lost contact with the other processes in {place} (they have --dist-timeout {timeout:g} seconds to answer). '
        f'Look at what they told. {error}')


def of_the_first(value: Any) -> Any:
    """What the first process has for a value, in all of them."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class Watchdog:
    """Where in the run a process is, for messages; and a watch that tells it when the process gets no further.

    Collectives on a GPU that nobody answers do not fail in Python: after the timeout the process is aborted. So a
    thread speaks before.

    Attributes:
        place: Such as 'epoch 1, update 7'.
    """

    def __init__(self):
        self.place = 'preparing'
        self._since = time.monotonic()
        self._ended = threading.Event()

    def move(self, place: str) -> None:
        """Note progress."""
        self.place = place
        self._since = time.monotonic()

    def watch(self, patience: float) -> None:
        """Tell from now on where the process is stuck, if nothing moves for so many seconds."""
        threading.Thread(target=self._watch, args=(patience,), daemon=True).start()

    def end(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _watch(self, patience: float) -> None:
        told = None
        while not self._ended.wait(patience / 20):
            since, stuck = self._since, time.monotonic() - self._since
            if stuck > patience and told != since:
                told = since
                _logger.error(f'No progress for {stuck:.0f} s in {self.place}. Does another process not answer?')
