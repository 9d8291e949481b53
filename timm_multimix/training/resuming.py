"""Continuing a run from a checkpoint: weights, optimizer, loss scaler and average."""
import argparse
import logging
from collections.abc import Iterable
from typing import Any

from safetensors.torch import load_file
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from torch.optim import Optimizer

from ..common.errors import UsageError, usage_errors
from ..options import multimix_option_names
from .checkpoints import read_checkpoint
from .optimizer_state import check_optimizer, load_optimizer
from .saved_weights import arguments_of, saved_weights

_logger = logging.getLogger(__name__)

# Prefixes of the options of the objective, which the card of a run lists for each of its parts.
_OBJECTIVE = ('multimix', 'no_multimix', 'mixup', 'cutmix', 'loss', 'smoothing', 'bce_', 'jsd_', 'asl_', 'poly_',
              'twoway_', 'db_', 'kd_', 'distill_loss', 'task_loss')
# Options that a checkpoint's optimizer keeps in its parameter groups, from where timm's schedulers take them.
_OPTIMIZER_OPTIONS = ('lr', 'weight_decay', 'momentum', 'opt_eps', 'opt_betas', 'layer_decay')


def check_architecture(args: argparse.Namespace, checkpoint: dict[str, Any], path: str) -> None:
    """Check that a checkpoint is of the run's model, if it says.

    Raises:
        UsageError: if not.
    """
    architecture = checkpoint.get('arch')
    if architecture not in (None, args.model):
        raise UsageError(f'{path} is a checkpoint of {architecture}, not of --model {args.model}.')


def _settle_changes(args: argparse.Namespace, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Warn of options that differ from those in a checkpoint.

    Options of the loss take effect from here on. Options of the optimizer have no effect, as its state holds them:
    they are set back to the values in the checkpoint.

    Returns:
        The options that were set back.
    """
    before = arguments_of(checkpoint)

    def changed(names: Iterable[str]) -> list[str]:
        return [name for name in names if name in before and before[name] != getattr(args, name)]

    def told(names: Iterable[str]) -> str:
        return ', '.join(
            f'--{name.replace("_", "-")} was {before[name]} and is {getattr(args, name)}' for name in names)

    if objective := changed(multimix_option_names()):
        _logger.warning(f'This run continues with another objective: {told(objective)}.')
    kept = [] if args.no_resume_opt else changed(_OPTIMIZER_OPTIONS)
    if kept:
        _logger.warning(
            f'The optimizer continues with the options it began with: {told(kept)}. For the new ones give '
            '--no-resume-opt, which starts it anew.')
    settled = {name: before[name] for name in kept}
    vars(args).update(settled)
    return settled


def _remember_objective(args: argparse.Namespace, checkpoint: dict[str, Any], epoch: int | None) -> None:
    """Record in args.earlier with which options of the loss the run was trained so far, if they change now."""
    before = arguments_of(checkpoint)
    options = {name: before[name] for name, value in vars(args).items()
               if name.startswith(_OBJECTIVE) and name in before and before[name] != value}
    earlier = list(before.get('earlier') or ())
    if options and epoch is not None:
        in_epoch = bool((checkpoint.get('progress') or {}).get('in_epoch'))
        earlier.append(dict(epoch=epoch, in_epoch=in_epoch, options=options))
    if earlier:
        args.earlier = earlier


def resume(args: argparse.Namespace, task: TrainingTask, optimizer: Optimizer, loss_scaler, path: str) -> dict:
    """Bring a task and its optimizer to the state in a checkpoint.

    Returns:
        What the checkpoint says beside weights: 'epoch' to continue with, 'progress' and 'metric', each None if it does
        not know; 'weights', the entries of its weights by name; and 'settled', options of the optimizer that were set
        back to those it began with.

    Raises:
        UsageError: if the checkpoint is damaged, or of another model or optimizer.
    """
    checkpoint = read_checkpoint(path)
    check_architecture(args, checkpoint, path)
    keep = not args.no_resume_opt
    if keep:
        check_optimizer(args, checkpoint, optimizer, path)
    settled = _settle_changes(args, checkpoint)
    try:
        epoch = resume_task_checkpoint(task, path, None, loss_scaler if keep else None, log_info=False)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f'{path} does not fit this run: {error}') from error
    if keep:
        load_optimizer(optimizer, checkpoint, path)
    _remember_objective(args, checkpoint, epoch)
    _logger.info(f'Continuing from {path}' + ('' if epoch is None else f' with epoch {epoch}.'))
    return dict(epoch=epoch, progress=checkpoint.get('progress'), metric=checkpoint.get('metric'),
                weights=saved_weights(checkpoint), settled=settled)


def load_weights(task: TrainingTask, path: str, name: str) -> None:
    """Load a file that holds nothing but weights, as the Hub has them: nothing else of the run can be continued.

    Args:
        task: Gets the weights.
        path: The safetensors file.
        name: What the user calls it.

    Raises:
        UsageError: if they are of another model.
    """
    with usage_errors(f'--resume {name} does not fit this model'):
        task.load_checkpoint_state(load_file(path))
    _logger.warning(f'--resume {name} holds weights alone: optimizer, schedule and epochs start anew.')


def setup_ema(args: argparse.Namespace, task: TrainingTask, path: str | None) -> None:
    """Start the average of the weights, from a checkpoint if one is given."""
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
