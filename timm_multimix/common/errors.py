"""Exceptions with one-line messages, and conversion of library errors to them."""
import logging
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pickle import UnpicklingError
from tarfile import TarError

from safetensors import SafetensorError

from .secrets import redact

_logger = logging.getLogger(__name__)

_LONGEST = 600
_handlers: list = []  # handlers of PyTorch that suppress_worker_errors has replaced

# Python code in messages of libraries, and the equivalent option of the command line.
_OPTIONS = (
    (r'`?\bdownload ?= ?True`?', '--dataset-download'),
    (r'`?\btrust_remote_code ?= ?True`?', '--dataset-trust-remote-code'),
    (r'Use `pretrained=False` for random init', 'Leave out --pretrained to start from random weights'),
    (r"`?\bglobal_pool=''`?", "--gp ''"),
    (r"\battach with mode='(\w+)'", r'use --multimix \1'),
    (r"\basl_reduction='(\w+)'", r'--asl-reduction \1'),
    (r'\b(class_counts and num_samples|class stats) \(see class_weights\.py\)', '--class-stats'),
    (r"\(loss(?:_type=| )'bce'\) with targets \(b, 1\)", '(--loss bce)'),
    (r'(?s)`?\bweights_only=True`? blocked loading .*',
     'the file is not a PyTorch checkpoint, or it contains objects that are not data, such as code.'),
)

# Exceptions that libraries raise for invalid arguments and files.
_LIBRARY_ERRORS = (
    ValueError, TypeError, LookupError, RuntimeError, AssertionError, OSError, ImportError, EOFError, UnpicklingError,
    SafetensorError, TarError)


def printable(text: str) -> str:
    """Replace control characters, line breaks and undecodable bytes of a text by escapes such as `\\n`."""
    return ''.join(
        char if char.isprintable() else char.encode('unicode_escape').decode('ascii') for char in text)


class _OneLine(Exception):
    """Exception whose text is one line without access tokens."""

    def __str__(self) -> str:
        line = printable(redact(' '.join(super().__str__().split())))  # redact before truncation
        return line if len(line) <= _LONGEST else line[:_LONGEST] + ' ...'


class UsageError(_OneLine):
    """Invalid options, data or files."""


class RunError(_OneLine):
    """Error that ends a run, such as a full disk, non-finite losses or a dead worker. Its checkpoints remain valid.

    Attributes:
        is_shared: Whether all processes raise the same error, so that only one needs to log it.
        hint: How to continue, to log after the error.
    """
    hint = ''

    def __init__(self, message: str, is_shared: bool = False):
        super().__init__(message)
        self.is_shared = is_shared


def is_dead_worker(error: BaseException) -> bool:
    """Return whether an error reports a dead DataLoader worker.

    PyTorch raises this error in a signal handler. It can therefore occur anywhere in the main process.
    """
    return isinstance(error, RuntimeError) and 'DataLoader worker' in str(error)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def raise_if_interrupted(error: BaseException) -> None:
    """Raise the exception of a signal handler in the causes of an error, if there is one.

    A library that is interrupted during a write can raise another error from its cleanup.
    """
    for cause in causes(error):
        if isinstance(cause, KeyboardInterrupt) or is_dead_worker(cause):
            raise cause


def suppress_worker_errors() -> None:
    """Suppress DataLoader-worker errors raised during shutdown."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD'):
        _handlers.append(signal.signal(signal.SIGCHLD, signal.SIG_DFL))


def restore_worker_errors() -> None:
    """Undo suppress_worker_errors. Call it after the loaders and their workers have ended."""
    while _handlers:
        signal.signal(signal.SIGCHLD, _handlers.pop() or signal.SIG_DFL)


@contextmanager
def usage_errors(what: str, hint: str = '') -> Iterator[None]:
    """Convert errors of a library call to a UsageError.

    Args:
        what: Start of the message: the option and its value, or another description of the cause.
        hint: End of the message, such as near_names(...).
    """
    try:
        yield
    except _LIBRARY_ERRORS as error:
        _logger.debug('', exc_info=True)
        text = str(error) or f'failed ({type(error).__name__}).'
        for code, option in _OPTIONS:
            text = re.sub(code, option, text)
        if hint and not text.endswith(('.', '?', '!')):
            text += '.'
        raise UsageError(f'{what}: {text}{hint}') from error


def near_names(name: str, names: Iterable[str], count: int = 3, cutoff: float = 0.5) -> str:
    """Suggest names similar to a misspelled one. Return '' if there are none, or if the name exists."""
    names = [str(name) for name in names]
    if name in names:
        return ''
    matches = get_close_matches(name, names, n=count, cutoff=cutoff)
    return f' Did you mean {", ".join(matches)}?' if matches else ''
