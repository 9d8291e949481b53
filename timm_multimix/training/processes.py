"""Several processes: how long they wait for each other, and what one tells that waits in vain."""
import logging
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .errors import RunError

_logger = logging.getLogger(__name__)


def set_timeout(seconds: float, group: dist.ProcessGroup | None = None) -> None:
    """Limit how long a collective of a process group waits, of the default one if none is given."""
    limit = timedelta(seconds=seconds)
    if hasattr(dist, 'set_timeout'):
        dist.set_timeout(limit, group)
    else:
        dist.distributed_c10d._set_pg_timeout(limit, group)


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


class Whereabouts:
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
