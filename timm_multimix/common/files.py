"""Atomic file writing, folder locks and temporary folders.

No function writes through a symbolic link. In a folder that other users can write to, a link with a predictable name
could point to any file of the user.
"""
import errno
import glob
import logging
import math
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import IO, Any

from filelock import FileLock, Timeout

from .errors import UsageError

_logger = logging.getLogger(__name__)

_TEMPORARY = '.tmp'
_LOCK = '.lock'
_WORK_FOLDER = '.hub-'
_PATIENCE = 5.0  # seconds to wait for a process that is about to end
_NO_FOLLOW = getattr(os, 'O_NOFOLLOW', 0)
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # errors of file systems without locks

_locks: dict[str, FileLock | None] = {}  # locks of this process by folder, None if the file system has none


def _write_holder(path: str) -> None:
    """Write the process into its lock file, for the message in _lock."""
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | _NO_FOLLOW)

    with suppress(OSError), open(path, 'w', opener=opener) as file:  # a locked file is not writable on Windows
        file.write(f'process {os.getpid()} on {socket.gethostname()}')


def _lock(folder: str, patience: float, option: str = '--experiment') -> bool:
    """Lock a folder. Return False if the file system does not support locks."""
    path = os.path.join(folder, _LOCK)
    if os.path.islink(path) or (os.path.exists(path) and os.stat(path).st_nlink > 1):
        raise UsageError(f'{path} is a link to another file. Remove it.')
    # Released in any thread. In a forked process the lock is closed, so that it ends with this process.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        with open(path, errors='replace') as file:
            holder = file.read(1000) or 'another process'
        raise UsageError(
            f'{folder} is in use by another run: {holder}. Wait for it, stop it, or choose another {option}.') from None
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    _locks[os.path.realpath(folder)] = lock
    _write_holder(path)
    return True


def lock_folder(folder: str, option: str = '--experiment', patience: float = _PATIENCE) -> None:
    """Lock a folder until unlock_folders is called or the process ends. A folder can be locked several times.

    Args:
        folder: The folder.
        option: Option that selects the folder, for the message.
        patience: Seconds to wait for another process that holds the lock.

    Raises:
        UsageError: if another process holds the lock, or if the lock file is a link.
    """
    name = os.path.realpath(folder)
    if name not in _locks and not _lock(folder, patience, option):
        _logger.warning(
            f'The file system of {folder} does not support locks. Do not start a second run in this folder.')
        _locks[name] = None


def _unlock(name: str) -> None:
    if lock := _locks.pop(name, None):
        lock.release()


def unlock_folders() -> None:
    """Release all locks of this process."""
    for name in list(_locks):
        _unlock(name)


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


def _copy(source: str, target: str) -> None:
    with open(source, 'rb') as old, create(target) as new:
        shutil.copyfileobj(old, new)


@contextmanager
def replacing(path: str, copy: bool = False) -> Iterator[str]:
    """Replace a file atomically. A symbolic link is replaced and not followed.

    Args:
        path: The file. It does not need to exist.
        copy: Start with a copy of the file, in order to change it.

    Yields:
        Path of a temporary file. It replaces the file if no exception is raised.
    """
    temporary = path + _TEMPORARY
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        if copy and os.path.exists(path) and not os.path.islink(path):
            _copy(path, temporary)
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
            _copy(source, temporary)


def remove_temporary(folder: str) -> None:
    """Remove incomplete files of killed processes."""
    for name in os.listdir(folder):
        if name.endswith(_TEMPORARY):
            with suppress(OSError):
                os.unlink(os.path.join(folder, name))


@contextmanager
def work_folder(parent: str) -> Iterator[str]:
    """Create an empty temporary folder in `parent`, or in the system's temporary folder if `parent` is not writable.

    The folder is locked while it is in use, so that remove_work_folders removes only folders of killed processes.
    """
    inside = parent if os.access(parent, os.W_OK) else None
    with TemporaryDirectory(prefix=_WORK_FOLDER, dir=inside, ignore_cleanup_errors=True) as path:
        try:
            _lock(path, 0)
            folder = os.path.join(path, 'files')
            os.mkdir(folder)
            yield folder
        finally:
            _unlock(os.path.realpath(path))


def remove_work_folders(parent: str) -> None:
    """Remove work folders of killed processes from a folder."""
    for path in glob.glob(os.path.join(glob.escape(parent), _WORK_FOLDER + '*')):
        if os.path.islink(path) or not os.path.isdir(path) or os.path.realpath(path) in _locks:
            continue
        with suppress(UsageError, OSError):  # in use, or owned by another user
            if _lock(path, 0):
                shutil.rmtree(path, ignore_errors=True)
                _unlock(os.path.realpath(path))


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
