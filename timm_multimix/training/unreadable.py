"""Report images that could not be read in training and validation."""
from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from .run import Run

_logger = logging.getLogger(__name__)


def begin_epoch(run: Run) -> None:
    """Reset the counts of unreadable images for a new epoch."""
    for record in run.loaders.unreadable.values():
        record.begin_epoch()


def count_unreadable(run: Run, part: str) -> int:
    """Count the unreadable images of this epoch over all processes. All processes must call it.

    Args:
        run: The run.
        part: TRAINING or VALIDATION.
    """
    record = run.loaders.unreadable.get(part)
    if record is None:
        return 0
    if run.args.distributed:
        found = [None] * run.args.world_size
        dist.all_gather_object(found, record.in_epoch())
        for indices in found:
            record.update(indices)
    return len(record.in_epoch())


def warn_of_unreadable(run: Run, part: str, when: str = '') -> None:
    """Log a warning with the names of the unreadable images of this epoch. All processes must call it."""
    count = count_unreadable(run, part)
    if count:
        record = run.loaders.unreadable[part]
        _logger.warning(
            f'{when}{count} images could not be read in {part} and were replaced by the next images: '
            f'{record.names(record.in_epoch())}')


def report_totals(run: Run) -> None:
    """Log the number of unreadable images of the whole run, if there are any."""
    totals = []
    for part, record in run.loaders.unreadable.items():
        found = record.in_run()
        totals.append(f'{len(found)} of {len(record)} in {part}{f" ({record.names(found)})" if found else ""}')
    if any(record.in_run() for record in run.loaders.unreadable.values()):
        _logger.warning(f'Images that could not be read: {", ".join(totals)}.')
