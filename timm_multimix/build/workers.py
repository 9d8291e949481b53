"""Data loading workers: signal handling, and termination after an error."""
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..common.errors import suppress_worker_errors

_JOIN_TIMEOUT = 5  # seconds to wait for a killed worker


def ignore_signals(init: Callable[[int], None] | None, worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a DataLoader worker, then call another worker_init_fn.

    Ctrl-C and job schedulers signal the whole process group. The run needs the next batch of its workers to stop
    between two updates, so workers must not exit on the signal. The run kills them itself, see ending_workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(worker)


@contextmanager
def ending_workers() -> Iterator[None]:
    """Context manager that kills the workers started inside it if an exception is raised.

    A worker may be loading a batch or be blocked by a file system, which would prevent the process from exiting.
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
            worker.join(_JOIN_TIMEOUT)
        raise
