"""Stop a run between two updates on SIGINT or SIGTERM."""
import logging
import signal
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

_logger = logging.getLogger(__name__)


class StopRequest:
    """Context manager that records SIGINT (Ctrl-C) and SIGTERM, so that the loop can stop between two updates.

    An exception raised by the signal handler could interrupt an optimizer step or the writing of a checkpoint, or be
    lost in a callback. Only a second signal raises KeyboardInterrupt, in case the step does not end.

    Outside of the main thread it does nothing, because Python does not allow signal handlers there.

    Attributes:
        signal_number: Number of the received signal, or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}
        self._group = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        _logger.info('Stopping after this step. Send the signal again to stop immediately.')

    def ignore(self) -> None:
        """Ignore further signals, while the last checkpoint is written."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def connect(self, timeout: float) -> None:
        """Make all processes stop at the same update. All must call it. `timeout` is in seconds."""
        self._group = dist.new_group(backend='gloo', timeout=timedelta(seconds=timeout))

    def requested(self) -> bool:
        """Return whether to stop. Connected processes must call it equally often, and get the same result.

        The result includes the signals up to the previous call: the exchange is asynchronous, so no process waits.
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
        """Raise KeyboardInterrupt if a signal was received and the process is not connected to others."""
        if self._group is None and self.signal_number is not None:
            raise KeyboardInterrupt
