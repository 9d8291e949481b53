"""Errors that the user can put right, told in one line."""
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pickle import UnpicklingError

from safetensors import SafetensorError

from .advice import for_command_line
from .secrets import redact

_logger = logging.getLogger(__name__)

_LONGEST = 600
_handlers: list = []  # PyTorch's, where it is put aside

# What libraries raise for bad arguments and files.
_LIBRARY_ERRORS = (
    ValueError, TypeError, LookupError, RuntimeError, AssertionError, OSError, ImportError, EOFError, UnpicklingError,
    SafetensorError)


def printable(text: str) -> str:
    """Write control characters, line breaks and undecodable bytes of a text as escapes such as `\\n`."""
    return ''.join(
        char if char.isprintable() else char.encode('unicode_escape').decode('ascii') for char in text)


class _OneLine(Exception):
    """Shown as one line, without a traceback."""

    def __str__(self) -> str:
        line = printable(redact(' '.join(super().__str__().split()), only_certain=True))  # before it is cut
        return line if len(line) <= _LONGEST else line[:_LONGEST] + ' ...'


class UsageError(_OneLine):
    """Something in the options, the data or a file is wrong."""


class RunError(_OneLine):
    """A run cannot go on: a full disk, losses that are not finite, a worker that died. Its checkpoints are intact.

    Attributes:
        is_shared: Whether it is the same in all processes, so that one of them tells it.
    """

    def __init__(self, message: str, is_shared: bool = False):
        super().__init__(message)
        self.is_shared = is_shared


def is_dead_worker(error: BaseException) -> bool:
    """Whether an error says that a DataLoader worker died.

    PyTorch raises this error in a signal handler, and therefore at any point of the main process.
    """
    return isinstance(error, RuntimeError) and 'DataLoader worker' in str(error)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the errors during whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def raise_if_interrupted(error: BaseException) -> None:
    """Raise the exception of a signal handler that an error was raised from, if there is one.

    A library that is interrupted while it writes may raise an error of its own from its cleanup.
    """
    for cause in causes(error):
        if isinstance(cause, KeyboardInterrupt) or is_dead_worker(cause):
            raise cause


def suppress_worker_errors() -> None:
    """Keep PyTorch's errors of dead workers out of the end of a run: they have been told, or matter no more."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD'):
        _handlers.append(signal.signal(signal.SIGCHLD, signal.SIG_DFL))


def restore_worker_errors() -> None:
    """Undo suppress_worker_errors, when loaders and their workers are gone."""
    while _handlers:
        signal.signal(signal.SIGCHLD, _handlers.pop() or signal.SIG_DFL)


@contextmanager
def usage_errors(what: str, hint: str = '') -> Iterator[None]:
    """Turn errors of a library call into a UsageError that starts with what the user gave.

    Args:
        what: The option and its value, or another name for the cause.
        hint: Appended to the message, such as near_names(...).
    """
    try:
        yield
    except _LIBRARY_ERRORS as error:
        _logger.debug('', exc_info=True)
        text = for_command_line(str(error)) or f'refused ({type(error).__name__}).'
        if hint and not text.endswith(('.', '?', '!')):
            text += '.'
        raise UsageError(f'{what}: {text}{hint}') from error


def near_names(name: str, names, count: int = 3, cutoff: float = 0.5) -> str:
    """Suggest the names that are close to a misspelt one; empty if none is close, or if the name exists."""
    names = list(names)
    if name in names:
        return ''
    matches = get_close_matches(name, names, n=count, cutoff=cutoff)
    return f' Did you mean {", ".join(matches)}?' if matches else ''
