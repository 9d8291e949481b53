"""Writing files so that a reader, or a run that continues, finds the old one or the new one and nothing between."""
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TEMPORARY = '.tmp'
_LOCK = '.lock'
_PATIENCE = 5.0  # seconds, for a process that is just ending

_locks: dict[str, int] = {}  # folders that this process holds, with the descriptors of their locks


def make_folder(path: str) -> str:
    """Make a folder that was not there before, with a number after its name if need be.

    Returns:
        Its path.
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


def lock_folder(folder: str) -> None:
    """Let no other process that asks have a folder until unlock_folders, or until this one ends, however it does.

    Where the file system knows no locks, nothing is locked.

    Args:
        folder: The folder; locked by this process already, it stays so.

    Raises:
        UsageError: if another process has it, for longer than a process takes to end.
    """
    name = os.path.realpath(folder)
    if fcntl is None or name in _locks:
        return
    descriptor = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + _PATIENCE
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
                f'{folder} belongs to a run that goes on: {holder}. Wait for it, stop it, or choose another '
                '--experiment.') from None
        except OSError:  # not supported
            os.close(descriptor)
            return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()}'.encode())
    _locks[name] = descriptor


def unlock_folders() -> None:
    """Let others have the folders that this process holds."""
    while _locks:
        os.close(_locks.popitem()[1])


if hasattr(os, 'register_at_fork'):  # a lock is held as long as anybody has it open, such as workers that die later
    os.register_at_fork(after_in_child=unlock_folders)


def sync_folder(path: str) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(path or '.', os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace(source: str, target: str) -> None:
    """Give a complete, flushed file its name, in place of another of that name."""
    os.replace(source, target)
    sync_folder(os.path.dirname(target))


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Change a file at once or not at all.

    Yields:
        Path of a copy, or of nothing if there is no such file yet; what lies there at the end becomes the file.
    """
    temporary = path + _TEMPORARY
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        if os.path.exists(path):
            shutil.copyfile(path, temporary)
        yield temporary
        if os.path.exists(temporary):
            with open(temporary, 'rb+') as file:
                os.fsync(file.fileno())
            replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def duplicate(source: str, target: str) -> None:
    """Give a file a second name, in place of another file of that name; copies it where links are not supported."""
    temporary = target + _TEMPORARY
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        try:
            os.link(source, temporary)
        except (OSError, NotImplementedError):
            shutil.copyfile(source, temporary)
            with open(temporary, 'rb+') as file:
                os.fsync(file.fileno())
        replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):  # replacing a file by a link to itself leaves both
            os.unlink(temporary)


def remove_temporary(folder: str) -> None:
    """Remove what a killed process left half-written."""
    for name in os.listdir(folder):
        if name.endswith(_TEMPORARY):
            with suppress(OSError):
                os.unlink(os.path.join(folder, name))
