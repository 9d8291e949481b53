"""Stopping between steps instead of in the middle of one."""
import logging
import signal
import threading
from types import FrameType

_logger = logging.getLogger(__name__)


class StopRequest:
    """Notes Ctrl-C (SIGINT) and SIGTERM, for the loop to act on between two steps.

    An exception raised wherever the signal happens to arrive could leave an optimizer step or a checkpoint half done,
    or be lost in a callback. A second signal raises one even so, for a step that never ends.

    Used as a context manager; outside of the main thread, where Python allows no signal handlers, it does nothing.

    Attributes:
        signal_number: The signal that came, or None.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._previous = {}

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

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came; called where stopping does no harm."""
        if self.signal_number is not None:
            raise KeyboardInterrupt
