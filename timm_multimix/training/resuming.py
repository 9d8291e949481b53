"""Resume a run from a checkpoint: weights, EMA, optimizer, loss scaler, schedule and state."""
import argparse
import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from safetensors.torch import load_file
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint

from ..build.checkpoint import read_checkpoint
from ..build.option import option_name
from ..build.saved_weights import arguments_of
from ..common.errors import UsageError, usage_errors
from .setup import Setup
from .state import RunState

_logger = logging.getLogger(__name__)

# Prefixes of the options of the loss and of the averages. The model card lists them for each part of a run that was
# trained with other values.
_OBJECTIVE = ('model_ema', 'multimix', 'no_multimix', 'mixup', 'cutmix', 'loss', 'smoothing', 'bce_', 'jsd_', 'asl_',
              'poly_', 'twoway_', 'db_', 'kd_', 'distill_loss', 'task_loss')
# Options of the data and the schedule, which a resumed run may change.
_DATA_AND_SCHEDULE = ('dataset', 'data_dir', 'train_split', 'seed', 'batch_size', 'grad_accum_steps', 'img_size',
                      'input_size', 'sched')
# Options that are part of the optimizer state. timm's schedulers read them from its parameter groups.
_OPTIMIZER_OPTIONS = ('lr', 'weight_decay', 'momentum', 'opt_eps', 'opt_betas', 'layer_decay')
_REMEDY = 'or give --no-resume-opt, which resets the optimizer'


def check_architecture(args: argparse.Namespace, checkpoint: dict[str, Any], path: str) -> None:
    """Check that a checkpoint is of the architecture of the run, if it stores its architecture."""
    architecture = checkpoint.get('arch')
    if architecture not in (None, args.model):
        raise UsageError(f'{path} is a checkpoint of {architecture}, not of --model {args.model}.')


def _settle_changes(setup: Setup, checkpoint: dict[str, Any], epoch: int | None) -> None:
    """Warn about options that differ from the checkpoint.

    Changed options of the loss and the averages are used, and args.earlier records the previous values. Changed
    optimizer options are reset to the values in the checkpoint, because they are part of the optimizer state.
    """
    args, before = setup.args, arguments_of(checkpoint)
    changed = {name: before[name] for name, value in vars(args).items() if name in before and before[name] != value}
    objective = {name: value for name, value in changed.items() if name.startswith(_OBJECTIVE)}
    reset = {name: changed[name] for name in _OPTIMIZER_OPTIONS if name in changed and not args.no_resume_opt}

    def listed(options: Mapping[str, Any]) -> str:
        return ', '.join(f'{option_name(name)} was {old} and is {getattr(args, name)}' for name, old in options.items())

    if objective:
        _logger.warning(f'This run continues with another objective or average: {listed(objective)}.')
    if others := {name: changed[name] for name in _DATA_AND_SCHEDULE if name in changed}:
        _logger.warning(f'This run continues with other data or another schedule: {listed(others)}.')
    if reset:
        _logger.warning(
            f'The optimizer keeps the options in the checkpoint: {listed(reset)}. To use the new values, give '
            '--no-resume-opt, which resets the optimizer.')
    vars(args).update(reset)
    setup.options.update(reset)
    earlier = list(before.get('earlier') or ())
    if objective and epoch is not None:
        in_epoch = bool((checkpoint.get('progress') or {}).get('in_epoch'))
        earlier.append(dict(epoch=epoch, in_epoch=in_epoch, options=objective))
    if earlier:
        args.earlier = earlier


def _check_optimizer(args: argparse.Namespace, before: Mapping[str, Any], path: str) -> None:
    """Check that the run has the optimizer of a checkpoint with the options `before`."""
    def described(options: Mapping[str, Any]) -> str:
        kwargs = [f'{key}={value}' for key, value in sorted((options.get('opt_kwargs') or {}).items())]
        text = ' '.join([f'--opt {options["opt"].lower()}', *(['--opt-kwargs', *kwargs] if kwargs else [])])
        return text.replace('(', '[').replace(')', ']')  # a YAML file contains lists instead of tuples

    old, new = described(before), described(vars(args))
    if old != new:
        raise UsageError(
            f'{path} contains the optimizer state of {old}, but this run uses {new}. Continue with {old}, {_REMEDY}.')


def resume(setup: Setup, path: str) -> dict[str, Any]:
    """Restore the task and, without --no-resume-opt, the optimizer and the loss scaler of a run from a checkpoint.

    Changed optimizer options are reset to the values in the checkpoint.

    Returns:
        The checkpoint. Its 'epoch' is the epoch to continue with, None if the checkpoint does not contain it.
    """
    args, checkpoint = setup.args, read_checkpoint(path)
    check_architecture(args, checkpoint, path)
    before = arguments_of(checkpoint)
    resumes_optimizer = not args.no_resume_opt and 'optimizer' in checkpoint
    if resumes_optimizer and before.get('opt'):
        _check_optimizer(args, before, path)
    with usage_errors(f'{path} does not fit this run'):
        epoch = resume_task_checkpoint(
            setup.task, path, None, None if args.no_resume_opt else setup.loss_scaler, log_info=False)
    if resumes_optimizer:
        with usage_errors(
                f'The optimizer state in {path} does not fit this run',
                f' Use the options of the original run, {_REMEDY}.'):
            setup.optimizer.load_state_dict(deepcopy(checkpoint['optimizer']))  # a copy of memory-mapped tensors
    _settle_changes(setup, checkpoint, epoch)
    _logger.info(f'Continuing from {path}{"" if epoch is None else f" with epoch {epoch}"}.')
    return {**checkpoint, 'epoch': epoch}


def load_weights(task: TrainingTask, path: str, name: str) -> None:
    """Load the weights of a task from a safetensors file, such as a model on the Hub. `name` is used in messages."""
    with usage_errors(f'--resume {name} does not fit this model'):
        task.load_checkpoint_state(load_file(path))
    _logger.warning(f'--resume {name} contains only weights: optimizer, schedule and epoch start from the beginning.')


def setup_ema(args: argparse.Namespace, task: TrainingTask, path: str | None) -> None:
    """Set up the EMA of a task, with the weights of a checkpoint if a path is given."""
    task.setup_ema(
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device='cpu' if args.model_ema_force_cpu else None,
    )
    if path:
        with usage_errors(f'{path} does not fit this run'):
            load_task_ema_checkpoint(task, path)


def _is_usable(state: RunState, progress: dict[str, Any] | None) -> bool:
    """Return whether a run can continue from a saved state, and log how it will differ from an uninterrupted run."""
    if not progress:
        _logger.info('The checkpoint contains no random state: the results will differ from an uninterrupted run.')
        return False
    before, now = progress['shape'], state.settings()
    changed = [name for name, value in now.items() if before.get(name) != value]
    differences = ', '.join(
        f'{name.replace("_", " ")} {before.get(name)} before and {now[name]} now' for name in changed)
    resumable = state.setup.loaders.resumable is not None and progress['processes'][0]['loader'] is not None
    if progress['in_epoch'] and (changed not in ([], ['workers']) or not resumable):
        _logger.warning(
            f'Epoch {state.epoch} was interrupted after {progress["consumed"]} batches and begins again with the '
            f'current weights: {differences or "this kind of loader cannot continue in the middle of an epoch"}.')
        return False
    if 'processes' in changed:
        _logger.warning(f'Images and random numbers will differ from an uninterrupted run: {differences}.')
        return False
    if 'workers' in changed:
        _logger.warning(f'Augmentations, but not images, will differ from an uninterrupted run: {differences}.')
    elif not resumable:
        _logger.warning('This kind of loader saves no random state: images will differ from an uninterrupted run.')
    return True


def _set_schedule(state: RunState, checkpoint: dict[str, Any]) -> None:
    """Set the learning rate to the start of the run."""
    setup, scheduler, epoch = state.setup, state.setup.scheduler, state.epoch
    saved = (checkpoint.get('progress') or {}).get('scheduler')
    if saved and hasattr(scheduler, 'lr_scheduler'):
        scheduler.lr_scheduler.load_state_dict(saved['inner'])
        scheduler.restore_lr = saved['restore_lr']
        for group, rate in zip(setup.optimizer.param_groups, saved['lr'], strict=True):
            group['lr'] = rate
        if not checkpoint['progress']['in_epoch']:  # checkpoints are written before this step
            metric = checkpoint.get('metric')
            scheduler.step(epoch, math.nan if metric is None else metric)  # NaN is not stored
    elif scheduler is not None and setup.args.sched_on_updates:
        updates = state.consumed // setup.args.grad_accum_steps
        if epoch or updates:
            scheduler.step_update(epoch * setup.updates_per_epoch + updates)
    elif scheduler is not None and epoch:
        scheduler.step(epoch)


def set_start(state: RunState, checkpoint: dict[str, Any]) -> None:
    """Set a new state and the schedule to the start of training. `checkpoint` is from `resume`, empty for a new run."""
    args = state.setup.args
    resume_epoch = checkpoint.get('epoch') or 0
    state.epoch = resume_epoch if args.start_epoch is None else args.start_epoch
    with usage_errors(f'{state.setup.resumed_from}: its progress entry is invalid'):
        if checkpoint and state.epoch == resume_epoch and not args.no_resume_opt and (
                _is_usable(state, checkpoint.get('progress'))):
            state.load_state_dict(checkpoint['progress'])
        _set_schedule(state, checkpoint)
