"""Resume a run from a checkpoint: weights, EMA, optimizer, loss scaler, schedule and state."""
import argparse
import logging
import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from safetensors.torch import load_file
from timm.optim import get_optimizer_info
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from torch.optim import Optimizer

from ..build.checkpoint import read_checkpoint
from ..build.option import option_name
from ..build.saved_weights import arguments_of, saved_weights
from ..common.errors import UsageError, usage_errors
from ..options import multimix_option_names
from .state import RunState

_logger = logging.getLogger(__name__)

# Prefixes of the loss options. The model card lists them for each part of a run that was trained with other values.
_OBJECTIVE = ('multimix', 'no_multimix', 'mixup', 'cutmix', 'loss', 'smoothing', 'bce_', 'jsd_', 'asl_', 'poly_',
              'twoway_', 'db_', 'kd_', 'distill_loss', 'task_loss')
# Options that are part of the optimizer state. timm's schedulers read them from its parameter groups.
_OPTIMIZER_OPTIONS = ('lr', 'weight_decay', 'momentum', 'opt_eps', 'opt_betas', 'layer_decay')
_LOOKAHEAD = 'lookahead_'
# State with the shape of the parameter, in the optimizers of PyTorch and timm that have it.
_PARAMETER_BUFFERS = {'momentum_buffer', 'exp_avg', 'max_exp_avg_sq', 'square_avg', 'slow_buffer'}
_REMEDY = 'or give --no-resume-opt, which resets the optimizer'


def check_architecture(args: argparse.Namespace, checkpoint: dict[str, Any], path: str) -> None:
    """Check that a checkpoint is of the architecture of the run, if it stores its architecture.

    Raises:
        UsageError: if the architecture differs.
    """
    architecture = checkpoint.get('arch')
    if architecture not in (None, args.model):
        raise UsageError(f'{path} is a checkpoint of {architecture}, not of --model {args.model}.')


def _settle_changes(args: argparse.Namespace, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Warn about options that differ from the checkpoint.

    Changed loss options are used. Changed optimizer options are reset in `args` to the values in the checkpoint,
    because they are part of the optimizer state.

    Returns:
        The options that were reset.
    """
    before = arguments_of(checkpoint)

    def changed(names: Iterable[str]) -> list[str]:
        return [name for name in names if name in before and before[name] != getattr(args, name)]

    def listed(names: Iterable[str]) -> str:
        return ', '.join(f'{option_name(name)} was {before[name]} and is {getattr(args, name)}' for name in names)

    if objective := changed(multimix_option_names()):
        _logger.warning(f'This run continues with another objective: {listed(objective)}.')
    reset = [] if args.no_resume_opt else changed(_OPTIMIZER_OPTIONS)
    if reset:
        _logger.warning(
            f'The optimizer keeps the options in the checkpoint: {listed(reset)}. To use the new values, give '
            '--no-resume-opt, which resets the optimizer.')
    settled = {name: before[name] for name in reset}
    vars(args).update(settled)
    return settled


def _remember_objective(args: argparse.Namespace, checkpoint: dict[str, Any], epoch: int | None) -> None:
    """Append the previous loss options to args.earlier if they change in this run."""
    before = arguments_of(checkpoint)
    options = {name: before[name] for name, value in vars(args).items()
               if name.startswith(_OBJECTIVE) and name in before and before[name] != value}
    earlier = list(before.get('earlier') or ())
    if options and epoch is not None:
        in_epoch = bool((checkpoint.get('progress') or {}).get('in_epoch'))
        earlier.append(dict(epoch=epoch, in_epoch=in_epoch, options=options))
    if earlier:
        args.earlier = earlier


def _as_lists(value: Any) -> Any:
    """Convert tuples to lists, as YAML files contain them."""
    if isinstance(value, Mapping):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _identity(name: str, options: Mapping[str, Any]) -> tuple:
    """Return a key that is equal for aliases of the same optimizer with the same --opt-kwargs."""
    name = name.lower()
    base = name.removeprefix(_LOOKAHEAD)
    try:
        info = get_optimizer_info(base)
        return name != base, info.opt_class, info.defaults or {}, _as_lists(options)
    except ValueError:  # an optimizer of another version of timm
        return name != base, base, {}, _as_lists(options)


def _described(name: str, options: Mapping[str, Any]) -> str:
    shown = ' '.join(f'{key}={value}' for key, value in options.items())
    return f'--opt {name}' + (f' --opt-kwargs {shown}' if shown else '')


def _check_optimizer(args: argparse.Namespace, checkpoint: Mapping[str, Any], optimizer: Optimizer, path: str) -> None:
    """Check that the optimizer state of a checkpoint, if there is one, is of the optimizer of the run."""
    if 'optimizer' not in checkpoint:
        return
    before = arguments_of(checkpoint)
    if before.get('opt'):
        options = before.get('opt_kwargs') or {}
        if _identity(before['opt'], options) != _identity(args.opt, args.opt_kwargs):
            old, new = _described(before['opt'], options), _described(args.opt, args.opt_kwargs)
            raise UsageError(
                f'{path} contains the optimizer state of {old}, but this run uses {new}. Continue with {old}, '
                f'{_REMEDY}.')
        return
    # Without the name of the optimizer only the names of its hyperparameters can be compared. Schedulers and other
    # versions of PyTorch add some.
    for saved, group in zip(checkpoint['optimizer']['param_groups'], optimizer.param_groups, strict=False):
        missing, unknown = set(group) - set(saved), set(saved) - set(group) - {'initial_lr', 'lr_scale'}
        if missing and unknown:
            raise UsageError(
                f'{path} contains the state of an optimizer other than --opt {args.opt}: it has '
                f'{", ".join(sorted(unknown))} and lacks {", ".join(sorted(missing))}. Continue with the optimizer '
                f'that wrote it, {_REMEDY}.')


def _check_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved state has other types of hyperparameters, or tensors of other shapes."""
    for group, saved_group in zip(optimizer.param_groups, saved['param_groups'], strict=True):
        for name, value in group.items():
            saved_value = saved_group.get(name, value)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and not isinstance(saved_value, (int, float, torch.Tensor)):
                raise ValueError(f'{name} is {saved_value!r}')
        for parameter, index in zip(group['params'], saved_group['params'], strict=True):
            state = saved['state'].get(index, {})
            for name in _PARAMETER_BUFFERS & state.keys():
                shape = getattr(state[name], 'shape', None)
                if state[name] is not None and shape != parameter.shape:
                    raise ValueError(f'{name} of parameter {index} has shape {shape}, not {parameter.shape}')


def _load_optimizer(optimizer: Optimizer, checkpoint: Mapping[str, Any], path: str) -> None:
    """Load the optimizer state of a checkpoint, if it has one."""
    if 'optimizer' not in checkpoint:
        return
    try:
        _check_state(optimizer, checkpoint['optimizer'])
        optimizer.load_state_dict(deepcopy(checkpoint['optimizer']))  # the tensors of the checkpoint are memory-mapped
    except Exception as error:
        raise UsageError(
            f'The optimizer state in {path} does not fit this run: {error}. Use the options of the original run, '
            f'{_REMEDY}.') from error


def resume(args: argparse.Namespace, task: TrainingTask, optimizer: Optimizer, loss_scaler: Any, path: str) -> dict:
    """Restore a task and, without --no-resume-opt, its optimizer and loss scaler from a checkpoint.

    Changed optimizer options in `args` are reset to the values in the checkpoint.

    Returns:
        A dict with 'epoch' (the epoch to continue with), 'progress' and 'metric', each None if the checkpoint does not
        contain it; 'weights', the entry of each weight set; and 'settled', the options that were reset.

    Raises:
        UsageError: if the checkpoint is damaged, or of another model or optimizer.
    """
    checkpoint = read_checkpoint(path)
    check_architecture(args, checkpoint, path)
    keep = not args.no_resume_opt
    if keep:
        _check_optimizer(args, checkpoint, optimizer, path)
    settled = _settle_changes(args, checkpoint)
    try:
        epoch = resume_task_checkpoint(task, path, None, loss_scaler if keep else None, log_info=False)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f'{path} does not fit this run: {error}') from error
    if keep:
        _load_optimizer(optimizer, checkpoint, path)
    _remember_objective(args, checkpoint, epoch)
    _logger.info(f'Continuing from {path}{"" if epoch is None else f" with epoch {epoch}"}.')
    return dict(epoch=epoch, progress=checkpoint.get('progress'), metric=checkpoint.get('metric'),
                weights=saved_weights(checkpoint), settled=settled)


def load_weights(task: TrainingTask, path: str, name: str) -> None:
    """Load the weights of a task from a safetensors file, such as a model on the Hub. `name` is used in messages.

    Raises:
        UsageError: if the weights do not fit the model.
    """
    with usage_errors(f'--resume {name} does not fit this model'):
        task.load_checkpoint_state(load_file(path))
    _logger.warning(f'--resume {name} contains only weights: optimizer, schedule and epoch start from the beginning.')


def setup_ema(args: argparse.Namespace, task: TrainingTask, path: str | None) -> None:
    """Set up the EMA of a task, with the weights of a checkpoint if a path is given.

    Raises:
        UsageError: if the checkpoint does not fit the run.
    """
    task.setup_ema(
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device='cpu' if args.model_ema_force_cpu else None,
    )
    if path:
        try:
            load_task_ema_checkpoint(task, path)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f'{path} does not fit this run: {error}') from error


def _is_usable(state: RunState, progress: dict[str, Any] | None) -> bool:
    """Return whether a run can continue from a saved state, and log how it will differ from an uninterrupted run."""
    if not progress:
        _logger.info('The checkpoint contains no random state: the results will differ from an uninterrupted run.')
        return False
    before, now = progress['shape'], state.settings()
    changed = {name for name, value in now.items() if before.get(name) != value}
    differences = ', '.join(
        f'{name.replace("_", " ")} {before.get(name)} before and {value} now' for name, value in now.items()
        if name in changed)
    resumable = state.setup.loaders.resumable is not None and progress['processes'][0]['loader'] is not None
    if progress['in_epoch'] and (changed - {'workers'} or not resumable):
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
    setup, epoch = state.setup, state.epoch
    scheduler = setup.scheduler
    progress, metric = checkpoint.get('progress'), checkpoint.get('metric')
    if progress and progress['scheduler'] and hasattr(scheduler, 'lr_scheduler'):
        saved = progress['scheduler']
        for name, value in scheduler.lr_scheduler.state_dict().items():
            expected = (int, float) if isinstance(value, (int, float)) else type(value)
            if not isinstance(saved['inner'][name], expected):
                raise TypeError(f'{name} of the schedule is of type {type(saved["inner"][name]).__name__}')
        scheduler.lr_scheduler.load_state_dict(saved['inner'])
        scheduler.restore_lr = saved['restore_lr']
        for group, rate in zip(setup.optimizer.param_groups, saved['lr'], strict=True):
            group['lr'] = rate
        if not progress['in_epoch']:  # checkpoints are written before this step
            scheduler.step(epoch, math.nan if metric is None else metric)  # NaN is not stored
    elif scheduler is not None and setup.args.sched_on_updates:
        updates = state.consumed // setup.args.grad_accum_steps
        if epoch or updates:
            scheduler.step_update(epoch * setup.updates_per_epoch + updates)
    elif scheduler is not None and epoch:
        scheduler.step(epoch)


def set_start(state: RunState, checkpoint: dict[str, Any]) -> None:
    """Set a new state and the schedule to the start of training.

    Args:
        state: The state.
        checkpoint: Return value of `resume`, empty for a new run.

    Raises:
        UsageError: if the state in the checkpoint is invalid.
    """
    args = state.setup.args
    resume_epoch = checkpoint.get('epoch') or 0
    state.epoch = resume_epoch if args.start_epoch is None else args.start_epoch
    try:
        if checkpoint and state.epoch == resume_epoch and not args.no_resume_opt and (
                _is_usable(state, checkpoint['progress'])):
            state.load_state_dict(checkpoint['progress'])
        _set_schedule(state, checkpoint)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if not checkpoint:
            raise
        raise UsageError(f'{state.setup.resumed_from}: its progress entry is invalid: {error!r}') from error
