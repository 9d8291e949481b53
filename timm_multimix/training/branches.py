"""Move checkpoints aside when a run continues from an earlier checkpoint."""
import itertools
import logging
import math
import os
import shutil
from collections.abc import Callable
from functools import partial

from ..calibration.run import CALIBRATED
from ..common.errors import UsageError
from ..hub.summary import SUMMARY_NAME
from .checkpoints import find_checkpoints, position
from .run import Run

_logger = logging.getLogger(__name__)


def _replaced(run: Run) -> list[str]:
    """Return the checkpoints that are later than the start of the run, the latest first."""
    start, found = position(run.resumed_from), []
    if run.args.start_epoch is not None:
        start = run.start_epoch - 1, False, 0, math.inf
    for path in [*find_checkpoints(run.folder), os.path.join(run.folder, CALIBRATED)]:
        try:
            place = position(path)
        except (UsageError, OSError):
            continue  # unreadable checkpoints are never selected
        length = 3 if path.endswith(CALIBRATED) else 4  # its file time is later than that of its source
        if place[:length] > start[:length]:
            found.append((place, path))
    return [path for _, path in sorted(found, reverse=True)]


def _move(path: str, stat: os.stat_result, folder: str) -> None:
    """Move a file into a folder, unless it was replaced by another file meanwhile."""
    if os.path.exists(path) and os.path.samestat(stat, os.stat(path)):
        os.makedirs(folder, exist_ok=True)
        os.replace(path, os.path.join(folder, os.path.basename(path)))


def set_aside(run: Run) -> Callable[[], None] | None:
    """Move the checkpoints that the run will replace to a subfolder, so that they are not selected any more.

    Later checkpoints than the start of the run are moved to superseded-1 (superseded-2, ...) in the run folder, with a
    copy of summary.csv.

    Args:
        run: A run that continues from a checkpoint in its own folder.

    Returns:
        A function that moves the checkpoint that the run continues from, to call after the next checkpoint is written.
        None if that checkpoint stays: it is moved only with an earlier --start-epoch.
    """
    names = (f'superseded-{number}' for number in itertools.count(1))
    folder = next(path for path in (os.path.join(run.folder, name) for name in names) if not os.path.exists(path))
    paths = _replaced(run)
    source = next((path for path in paths if os.path.realpath(path) == os.path.realpath(run.resumed_from or '')), None)
    others = [path for path in paths if path != source]
    if others:
        os.mkdir(folder)
        summary = os.path.join(run.folder, SUMMARY_NAME)
        if os.path.exists(summary):
            shutil.copyfile(summary, os.path.join(folder, SUMMARY_NAME))
        for path in others:
            _move(path, os.stat(path), folder)
        _logger.warning(
            f'{len(others)} checkpoints in {run.folder} are later than the start of this run. They are moved to '
            f'{folder}.')
    return None if source is None else partial(_move, source, os.stat(source), folder)
