"""Atomic file writing, folder locks and temporary folders.

No function writes through a symbolic link. In a folder that other users can write to, a link with a predictable name
could point to any file of the user.
"""
import glob
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import IO, Any

from .errors import UsageError

_logger = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TEMPORARY = '.tmp'
_LOCK = '.lock'
_WORK_FOLDER = '.hub-'
_PATIENCE = 5.0  # seconds to wait for a process that is about to end
_NO_FOLLOW = getattr(os, 'O_NOFOLLOW', 0)

_locks: dict[str, int | None] = {}  # descriptors of the locks of this process by folder, None without locks


def make_folder(path: str) -> str:
    """Create a new folder. If the path exists, append a number to it.

    Returns:
        Path of the new folder.
    """
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    number = 1
    while True:
        folder = path if number == 1 else f'{path}-{number}'
        try:
            os.mkdir(folder)
            return folder
        except FileExistsError:
            number += 1


def _open_lock(folder: str) -> int:
    path = os.path.join(folder, _LOCK)
    if os.path.islink(path):
        raise UsageError(f'{path} is a symbolic link. Remove it.')
    return os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o666)


def _write_holder(descriptor: int) -> None:
    if os.fstat(descriptor).st_nlink == 1:  # a hard link could be another file of the user
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()}'.encode())


def _lock(folder: str, patience: float, option: str = '--experiment') -> bool:
    """Lock a folder. Return False if the file system does not support locks."""
    name = os.path.realpath(folder)
    descriptor = _open_lock(folder)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            holder = os.read(descriptor, 1000).decode(errors='replace') or 'another process'
            os.close(descriptor)
            raise UsageError(
                f'{folder} is in use by another run: {holder}. Wait for it, stop it, or choose another '
                f'{option}.') from None
        except OSError:
            os.close(descriptor)
            return False
    _write_holder(descriptor)
    _locks[name] = descriptor
    return True


def lock_folder(folder: str, option: str = '--experiment') -> None:
    """Lock a folder until unlock_folders is called or the process ends.

    Args:
        folder: The folder. It can be locked by this process already.
        option: Option that selects the folder, for the message.

    Raises:
        UsageError: if another process holds the lock for 5 seconds, or if the lock file is a symbolic link.
    """
    name = os.path.realpath(folder)
    if fcntl is None or name in _locks:
        return
    if not _lock(folder, _PATIENCE, option):
        _logger.warning(
            f'The file system of {folder} does not support locks. Do not start a second run in this folder.')
        _locks[name] = None


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _unlock(folder: str) -> None:
    _close(_locks.pop(os.path.realpath(folder), None))


def unlock_folders() -> None:
    """Release all locks of this process."""
    while _locks:
        _close(_locks.popitem()[1])


if hasattr(os, 'register_at_fork'):  # otherwise workers could keep a lock after the main process has ended
    os.register_at_fork(after_in_child=unlock_folders)


def sync_folder(path: str) -> None:
    """Write the entries of a folder to the disk, if the system supports it."""
    with suppress(OSError):
        handle = os.open(path or '.', os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace(source: str, target: str) -> None:
    """Rename a flushed file. An existing target is replaced."""
    os.replace(source, target)
    sync_folder(os.path.dirname(target))


def create(path: str) -> IO[bytes]:
    """Open a new file for writing. An existing file or symbolic link is removed first."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, 'xb')  # fails if a link was created in the meantime


def _copy(source: str, target: str) -> None:
    with open(source, 'rb') as old, create(target) as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Replace a file atomically. A symbolic link is replaced and not followed.

    Yields:
        Path of a temporary copy of the file, or of a new file if there is none. Without an error it replaces the file.
    """
    temporary = path + _TEMPORARY
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        if os.path.exists(path) and not os.path.islink(path):
            _copy(path, temporary)
        yield temporary
        if os.path.exists(temporary):
            with open(temporary, 'rb+') as file:
                os.fsync(file.fileno())
            replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def duplicate(source: str, target: str) -> None:
    """Create a hard link to a file, or a copy if links are not supported. An existing target is replaced."""
    temporary = target + _TEMPORARY
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        try:
            os.link(source, temporary)
        except (OSError, NotImplementedError):
            _copy(source, temporary)
        replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):  # os.replace keeps both names if they are links to the same file
            os.unlink(temporary)


def remove_temporary(folder: str) -> None:
    """Remove incomplete files of killed processes."""
    for name in os.listdir(folder):
        if name.endswith(_TEMPORARY):
            with suppress(OSError):
                os.unlink(os.path.join(folder, name))


@contextmanager
def work_folder(parent: str) -> Iterator[str]:
    """Create a temporary folder in `parent`, or in the system's temporary folder if `parent` is not writable.

    The folder is locked while it is in use, so that remove_work_folders removes only folders of killed processes.

    Yields:
        Path of an empty folder with the default permissions of a new folder.
    """
    inside = parent if os.access(parent, os.W_OK) else None
    with TemporaryDirectory(prefix=_WORK_FOLDER, dir=inside, ignore_cleanup_errors=True) as path:
        try:
            if fcntl is not None:
                _lock(path, 0)
            folder = os.path.join(path, 'files')
            os.mkdir(folder)
            yield folder
        finally:
            _unlock(path)


def remove_work_folders(parent: str) -> None:
    """Remove work folders of killed processes from a folder."""
    for path in glob.glob(os.path.join(glob.escape(parent), _WORK_FOLDER + '*')) if fcntl is not None else ():
        if os.path.islink(path) or not os.path.isdir(path) or os.path.realpath(path) in _locks:
            continue
        with suppress(UsageError, OSError):  # in use, or owned by another user
            if _lock(path, 0):
                shutil.rmtree(path, ignore_errors=True)
                _unlock(path)


def check_output(folder: str) -> None:
    """Check that an output folder exists or can be created, and is writable. Nothing is created.

    Raises:
        UsageError: if not.
    """
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
