"""Where a run is: what it needs, beside weights and optimizer, to go on as if it had never stopped.

A checkpoint is made between two updates. Its progress holds, for every process, the random state, the place of the
loader and the averages of the epoch so far; and what it takes to tell whether another run may go on from there.
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
    """What has to be the same for an epoch to go on in its middle."""
    args = run.args
    return dict(
        processes=args.world_size,
        workers=args.workers,
        batch_size=args.batch_size,
        grad_accum_steps=args.grad_accum_steps,
        batches=len(run.loaders.train),
    )


def _scheduler_state(run: Run) -> dict[str, Any] | None:
    """State of a schedule that follows a metric. All others are functions of the epoch or the update."""
    inner = getattr(run.scheduler, 'lr_scheduler', None)
    if inner is None:
        return None
    rates = [group['lr'] for group in run.optimizer.param_groups]
    return dict(inner=inner.state_dict(), restore_lr=run.scheduler.restore_lr, lr=rates)


def _average_generator(run: Run) -> torch.Generator | None:
    """What rounds timm's average of bfloat16 weights."""
    return getattr(run.task.get_trainable_module(ema=True), '_sr_generator', None)


def _own_statistics(run: Run) -> dict[str, torch.Tensor]:
    """Normalisation statistics of this process, of the model and of averages of it.

    They differ between processes, which see different images. Averaging them after the epoch (--dist-bn reduce) needs
    all of them, and a teacher predicts with them. The first process keeps its own here too: the weights of a checkpoint
    that is written when validation is interrupted hold the averaged ones already.
    """
    return {name.replace('_orig_mod.', ''): buffer for name, buffer in normalisation_statistics(run.task).items()}


def take_progress(run: Run, averages: Averages | None = None) -> dict[str, Any] | None:
    """Take the progress of a run, between two updates. All processes call it.

    Args:
        run: The run.
        averages: Averages of the epoch so far; None after an epoch.

    Returns:
        The progress, plain data; None on all processes but the first.
    """
    loader, distributed = run.loaders.resumable, run.args.distributed
    own = dict(
        random=random_state(run.device),
        loader=None if loader is None else loader.state_dict(),
        averages=None if averages is None else averages.state_dict(),
        statistics={name: buffer.cpu() for name, buffer in _own_statistics(run).items()} if distributed else {},
    )
    processes = [own]
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
    """Errors of what a checkpoint holds are the checkpoint's."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UsageError(f'{run.resumed_from}: its record of the progress cannot be used: {error!r}') from error


def _check_states(progress: dict[str, Any]) -> None:
    """Read what is used later, after the run has begun to write. Raises the errors that reading_progress expects."""
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
    """Say how exactly a run can continue, before it does.

    Args:
        run: The run.
        progress: Of the checkpoint that it continues.

    Returns:
        What of the progress can be used, None for nothing. An epoch that cannot go on in its middle begins again.
    """
    if not progress:
        _logger.info('The checkpoint holds no random state: the run goes on, but not as if it had never stopped.')
        return None
    missing = {'in_epoch', 'consumed', 'processes', 'shape', 'scheduler', 'average', 'validated'} - progress.keys()
    if missing:
        raise KeyError(*missing)
    _check_states(progress)
    then, now = progress['shape'], _shape(run)
    changed = {name: (then.get(name), value) for name, value in now.items() if then.get(name) != value}
    told = ', '.join(f'{name.replace("_", " ")} {old} before and {new} now' for name, (old, new) in changed.items())
    resumable = run.loaders.resumable is not None and progress['processes'][0]['loader'] is not None
    if progress['in_epoch'] and (set(changed) - {'workers'} or not resumable):
        _logger.warning(
            f'Epoch {run.start_epoch} was interrupted after {progress["consumed"]} batches and begins again, with the '
            f'weights as they are: {told or "this kind of loader cannot go on in the middle of an epoch"}.')
        return None
    if 'processes' in changed:
        _logger.warning(f'Other images and other random numbers than without the interruption: {told}.')
        return None
    if 'workers' in changed:
        _logger.warning(f'The same images, but augmented otherwise than without the interruption: {told}.')
    elif not resumable:
        _logger.warning('This kind of loader keeps no random state: other images than without the interruption.')
    return progress


def step_scheduler(run: Run, checkpoint: dict[str, Any]) -> None:
    """Bring the schedule to where the run continues.

    Args:
        run: The run, with its start_epoch and the progress it continues with.
        checkpoint: What the checkpoint says beside weights, empty for a new run.
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
    """Put the random state and the loader of this process where they were; last, as building a run draws numbers.

    Args:
        run: The run, with the progress it continues with.

    Returns:
        Averages of the interrupted epoch, None if a new one begins.

    Raises:
        UsageError: if the progress is not what a checkpoint should hold.
    """
    progress = run.progress
    if progress is None:
        if run.start_epoch:  # not the numbers of the first epoch once more
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
