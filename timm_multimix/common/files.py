"""Atomic file writing and folder locks.

No function writes through a symbolic link. In a folder that other users can write to, a link with a predictable name
could point to any file of the user.
"""
import errno
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from filelock import FileLock, Timeout

from .errors import UsageError

_logger = logging.getLogger(__name__)

_TEMPORARY = '.tmp'
_LOCK = '.lock'
_PATIENCE = 5.0  # seconds to wait for a process that is about to end
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # errors of file systems without locks

_locks: dict[str, FileLock] = {}  # locks of this process by folder


def lock_folder(folder: str, option: str = '--experiment', patience: float = _PATIENCE) -> None:
    """Lock a folder until unlock_folders is called or the process ends. A folder can be locked several times.

    Raises:
        UsageError: if another process holds the lock for `patience` seconds, or if the lock file is a link. The message
            names the option that selects the folder.
    """
    name, path = os.path.realpath(folder), os.path.join(folder, _LOCK)
    if name in _locks:
        return
    if os.path.islink(path) or (os.path.exists(path) and os.stat(path).st_nlink > 1):
        raise UsageError(f'{path} is a link to another file. Remove it.')
    # Released in any thread. In a forked process the lock is closed, so that it ends with this process.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UsageError(
            f'{folder} is in use by another run. Wait for it, stop it, or choose another {option}.') from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _logger.warning(
            f'The file system of {folder} does not support locks. Do not start a second run in this folder.')
    _locks[name] = lock


def unlock_folders() -> None:
    """Release all locks of this process."""
    while _locks:
        _locks.popitem()[1].release()


def replace(source: str, target: str) -> None:
    """Rename a flushed file, and flush its folder if the system supports it. An existing target is replaced."""
    os.replace(source, target)
    with suppress(OSError):
        folder = os.open(os.path.dirname(target) or '.', os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def create(path: str) -> IO[bytes]:
    """Open a new file for writing. An existing file or symbolic link is removed first."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, 'xb')  # fails if a link was created in the meantime


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Replace or create a file atomically. A symbolic link is replaced and not followed.

    Yields:
        Path of a temporary file. It replaces the file if no exception is raised.
    """
    temporary = path + _TEMPORARY
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        yield temporary
        if os.path.exists(temporary):
            with open(temporary, 'rb+') as file:
                os.fsync(file.fileno())
            replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):  # os.replace keeps both names if they are links to the same file
            os.unlink(temporary)


def duplicate(source: str, target: str) -> None:
    """Create a hard link to a file, or a copy if links are not supported. An existing target is replaced."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except (OSError, NotImplementedError):
            with open(source, 'rb') as old, create(temporary) as new:
                shutil.copyfileobj(old, new)


def remove_temporary(folder: str) -> None:
    """Remove incomplete files of killed processes."""
    for name in os.listdir(folder):
        if name.endswith(_TEMPORARY):
            with suppress(OSError):
                os.unlink(os.path.join(folder, name))


def check_output(folder: str) -> None:
    """Raise UsageError unless an output folder is writable or can be created. Nothing is created."""
    parent = os.path.abspath(folder)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise UsageError(f'--output {folder}: {parent} is not a writable folder.')


def json_values(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None, and convert keys to strings."""
    if isinstance(value, dict):
        return {str(name): json_values(item) for name, item in value.items()}
    if isinstance(value, list):
        return [json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
