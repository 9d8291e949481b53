"""Writing files so that a reader, or a run that continues, finds the old one or the new one and nothing between."""
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_TEMPORARY = '.tmp'


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
