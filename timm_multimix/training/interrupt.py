"""Stopping between updates instead of in the middle of one, and ending the workers of loaders."""
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from ..common.errors import suppress_worker_errors

_logger = logging.getLogger(__name__)

_PATIENCE = 5  # seconds to wait for the end of a worker that was killed


class IgnoreSignals:
    """Starts a worker of a loader that leaves signals to the process it loads for.

    Ctrl-C, and SIGTERM from a scheduler, go to a whole group of processes. A worker that ended at once would take from
    its run the batch that it needs to stop between updates. The run ends its workers itself, see ending_workers.

    Args:
        init: What else starts a worker.
    """

    def __init__(self, init: Callable[[int], None] | None):
        self.init = init

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.init is not None:
            self.init(worker)


@contextmanager
def ending_workers() -> Iterator[None]:
    """Kill the workers that a run leaves behind when it fails or is stopped.

    They may be in the middle of a batch, or blocked by a file system, and would keep the process from ending.
    """
    before = {process.pid for process in multiprocessing.active_children()}
    try:
        yield
    except BaseException:
        workers = [process for process in multiprocessing.active_children() if process.pid not in before]
        if workers:
            suppress_worker_errors()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(_PATIENCE)
        raise


class StopRequest:
    """Notes Ctrl-C (SIGINT) and SIGTERM, for the loop to act on between two updates.

    An exception raised wherever the signal happens to arrive could leave an optimizer step or a checkpoint half done,
    or be lost in a callback. A second signal raises one even so, for a step that never ends.

    Used as a context manager; outside of the main thread, where Python allows no signal handlers, it does nothing.

    Attributes:
        signal_number: The signal that came, or None.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._previous = {}
        self._group = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        _logger.info('Stopping after this step. Once more to stop at once.')

    def ignore(self) -> None:
        """Let no more signals through: the last checkpoint is being written."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def connect(self, timeout: float) -> None:
        """Stop all processes of the default group at the same update; called by each of them.

        Args:
            timeout: Seconds to wait for the others.
        """
        self._group = dist.new_group(backend='gloo', timeout=timedelta(seconds=timeout))

    def requested(self) -> bool:
        """Whether to stop here. Connected processes call it equally often, and get the same answer.

        They learn of each other's signals one call later: then the exchange has long been made, and nobody waits.
        """
        if self._group is None:
            return self.signal_number is not None
        flag = torch.tensor([self.signal_number or 0])
        pending = self._pending
        self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag
        if pending is None:
            return False
        pending[0].wait()
        agreed = int(pending[1])
        self.signal_number = self.signal_number or agreed or None
        return agreed != 0

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came; called where a single process may stop on its own."""
        if self._group is None and self.signal_number is not None:
            raise KeyboardInterrupt
