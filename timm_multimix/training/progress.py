"""Save and restore the progress of a run, so that a continued run equals an uninterrupted one.

A checkpoint is written between two updates. Its progress contains, for every process, the random state, the position
of the loader and the metric averages of the epoch, and the settings that must be equal to continue exactly.
"""
from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from timm import utils

from ..common.console import Averages
from ..common.errors import UsageError
from ..common.random_state import check_random_state, random_state, set_random_state
from .loss_guard import normalisation_statistics

if TYPE_CHECKING:
    from .run import Run

_logger = logging.getLogger(__name__)


def _shape(run: Run) -> dict[str, int]:
    """Return the settings that must be unchanged to continue in the middle of an epoch."""
    args = run.args
    return dict(
        processes=args.world_size,
        workers=args.workers,
        batch_size=args.batch_size,
        grad_accum_steps=args.grad_accum_steps,
        batches=len(run.loaders.train),
    )


def _scheduler_state(run: Run) -> dict[str, Any] | None:
    """Return the state of a plateau schedule. All other schedules are functions of the epoch or the update."""
    inner = getattr(run.scheduler, 'lr_scheduler', None)
    if inner is None:
        return None
    rates = [group['lr'] for group in run.optimizer.param_groups]
    return dict(inner=inner.state_dict(), restore_lr=run.scheduler.restore_lr, lr=rates)


def _average_generator(run: Run) -> torch.Generator | None:
    """Return the random generator of stochastic rounding in timm's EMA of bfloat16 weights."""
    return getattr(run.task.get_trainable_module(ema=True), '_sr_generator', None)


def _own_statistics(run: Run) -> dict[str, torch.Tensor]:
    """Return the normalisation statistics of this process, of the model and its averaged copies.

    They differ between processes, which train on different images. --dist-bn reduce averages them after the epoch, and
    a teacher uses them in its forward pass. The statistics of the first process are included: the weights in a
    checkpoint written during validation already contain the averaged statistics.
    """
    return {name.replace('_orig_mod.', ''): buffer for name, buffer in normalisation_statistics(run.task).items()}


def take_progress(run: Run, averages: Averages | None = None) -> dict[str, Any] | None:
    """Collect the progress of a run between two updates. All processes must call it.

    Args:
        run: The run.
        averages: Metric averages of the epoch so far; None after an epoch.

    Returns:
        The progress as plain data; None on all processes but the first.
    """
    loader, distributed = run.loaders.resumable, run.args.distributed
    own = dict(
        random=random_state(run.device),
        loader=None if loader is None else loader.state_dict(),
        averages=None if averages is None else averages.state_dict(),
        statistics={name: buffer.cpu() for name, buffer in _own_statistics(run).items()} if distributed else {},
    )
    processes: list[Any] | None = [own]
    if distributed:
        processes = [None] * run.args.world_size if utils.is_primary(run.args) else None
        dist.gather_object(own, processes)
        if processes is None:
            return None
    generator = _average_generator(run)
    return dict(
        in_epoch=averages is not None,
        consumed=0 if averages is None or loader is None else loader.consumed,
        processes=processes,
        shape=_shape(run),
        scheduler=_scheduler_state(run),
        average=None if generator is None else generator.get_state(),
        validated=run.loaders.validated,
    )


@contextmanager
def reading_progress(run: Run) -> Iterator[None]:
    """Convert errors of usable_progress, step_scheduler and restore_progress to a UsageError about the checkpoint."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UsageError(f'{run.resumed_from}: its progress entry is invalid: {error!r}') from error


def _check_states(progress: dict[str, Any]) -> None:
    """Validate entries that are used only after the run has started to write. Raises errors for reading_progress."""
    for process in progress['processes']:
        states, loader = [process['random']], process['loader']
        if loader is not None:
            if 'consumed' not in loader:
                raise KeyError('consumed')
            states += [loader[name] for name in ('epoch_start', 'before', 'now', 'seed')]
            states += loader['workers'].values()
        for state in states:
            if state is not None:
                check_random_state(state)
        if progress['in_epoch']:
            Averages(torch.device('cpu')).load_state_dict(process['averages'])


def usable_progress(run: Run, progress: dict[str, Any] | None) -> dict[str, Any] | None:
    """Check whether a run can continue from a progress entry, and log how it will differ from an uninterrupted run.

    Args:
        run: The run.
        progress: Progress in the checkpoint, None if it has none.

    Returns:
        The progress, or None if it cannot be used. An interrupted epoch then begins again.
    """
    if not progress:
        _logger.info('The checkpoint contains no random state: the results will differ from an uninterrupted run.')
        return None
    missing = {'in_epoch', 'consumed', 'processes', 'shape', 'scheduler', 'average', 'validated'} - progress.keys()
    if missing:
        raise KeyError(*missing)
    _check_states(progress)
    then, now = progress['shape'], _shape(run)
    changed = {name: (then.get(name), value) for name, value in now.items() if then.get(name) != value}
    differences = ', '.join(
        f'{name.replace("_", " ")} {old} before and {new} now' for name, (old, new) in changed.items())
    resumable = run.loaders.resumable is not None and progress['processes'][0]['loader'] is not None
    if progress['in_epoch'] and (set(changed) - {'workers'} or not resumable):
        _logger.warning(
            f'Epoch {run.start_epoch} was interrupted after {progress["consumed"]} batches and begins again with the '
            f'current weights: {differences or "this kind of loader cannot continue in the middle of an epoch"}.')
        return None
    if 'processes' in changed:
        _logger.warning(f'Images and random numbers will differ from an uninterrupted run: {differences}.')
        return None
    if 'workers' in changed:
        _logger.warning(f'Augmentations, but not images, will differ from an uninterrupted run: {differences}.')
    elif not resumable:
        _logger.warning('This kind of loader saves no random state: images will differ from an uninterrupted run.')
    return progress


def step_scheduler(run: Run, checkpoint: dict[str, Any]) -> None:
    """Set the schedule to the start of the run.

    Args:
        run: The run, with start_epoch and progress set.
        checkpoint: Return value of resuming.resume, empty for a new run.
    """
    scheduler, epoch = run.scheduler, run.start_epoch
    if scheduler is None:
        return
    written, metric = checkpoint.get('progress'), checkpoint.get('metric')
    if written and written['scheduler'] and hasattr(scheduler, 'lr_scheduler'):
        state, fresh = written['scheduler'], scheduler.lr_scheduler.state_dict()
        for name, value in fresh.items():
            expected = (int, float) if isinstance(value, (int, float)) else type(value)
            if not isinstance(state['inner'][name], expected):
                raise TypeError(f'{name} of the schedule is of type {type(state["inner"][name]).__name__}')
        scheduler.lr_scheduler.load_state_dict(state['inner'])
        scheduler.restore_lr = state['restore_lr']
        for group, rate in zip(run.optimizer.param_groups, state['lr'], strict=True):
            group['lr'] = rate
        if not written['in_epoch']:  # checkpoints are written before this step
            scheduler.step(epoch, math.nan if metric is None else metric)  # NaN is not stored
    elif run.args.sched_on_updates:
        updates = run.progress['consumed'] // run.args.grad_accum_steps if run.progress else 0
        if epoch or updates:
            scheduler.step_update(epoch * run.updates_per_epoch + updates)
    elif epoch:
        scheduler.step(epoch)


def restore_progress(run: Run) -> dict[str, Any] | None:
    """Restore the random state, loader and normalisation statistics of this process.

    Call it last before training, because building a run draws random numbers.

    Args:
        run: The run, with progress set.

    Returns:
        Metric averages of the interrupted epoch, None if a new epoch begins.

    Raises:
        UsageError: if the progress is invalid.
    """
    progress = run.progress
    if progress is None:
        if run.start_epoch:  # do not repeat the random numbers of the first epoch
            utils.random_seed(run.args.seed + 1_000_003 * run.start_epoch, run.args.rank)
        return None
    with reading_progress(run):
        own = progress['processes'][run.args.rank]
        if run.loaders.resumable is not None and own['loader'] is not None:
            run.loaders.resumable.load_state_dict(
                own['loader'],
                same_workers=progress['shape']['workers'] == run.args.workers,
                in_epoch=progress['in_epoch'])
        if progress['validated']:
            run.loaders.forget_validation_seed()
        generator = _average_generator(run)
        if generator is not None and progress['average'] is not None:
            generator.set_state(progress['average'].cpu())
        for name, buffer in _own_statistics(run).items():
            if name in own['statistics']:
                buffer.copy_(own['statistics'][name])
        set_random_state(own['random'], run.device)
        if not progress['in_epoch']:
            return None
        return own['averages']
