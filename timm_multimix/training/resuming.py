"""Resume a run from a checkpoint: weights, EMA, optimizer and loss scaler."""
import argparse
import logging
from collections.abc import Iterable
from typing import Any

from safetensors.torch import load_file
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from torch.optim import Optimizer

from ..build.checkpoint import read_checkpoint
from ..build.saved_weights import arguments_of, saved_weights
from ..common.errors import UsageError, usage_errors
from ..options import multimix_option_names
from .optimizer_state import check_optimizer, load_optimizer

_logger = logging.getLogger(__name__)

# Prefixes of the loss options. The model card lists them for each part of a run that was trained with other values.
_OBJECTIVE = ('multimix', 'no_multimix', 'mixup', 'cutmix', 'loss', 'smoothing', 'bce_', 'jsd_', 'asl_', 'poly_',
              'twoway_', 'db_', 'kd_', 'distill_loss', 'task_loss')
# Options that are part of the optimizer state. timm's schedulers read them from its parameter groups.
_OPTIMIZER_OPTIONS = ('lr', 'weight_decay', 'momentum', 'opt_eps', 'opt_betas', 'layer_decay')


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
        return ', '.join(
            f'--{name.replace("_", "-")} was {before[name]} and is {getattr(args, name)}' for name in names)

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


def resume(args: argparse.Namespace, task: TrainingTask, optimizer: Optimizer, loss_scaler: Any, path: str) -> dict:
    """Restore a task, its optimizer and the loss scaler from a checkpoint.

    Args:
        args: Arguments of the run. Changed optimizer options are reset to the values in the checkpoint.
        task: The task.
        optimizer: The optimizer. It is not restored with --no-resume-opt.
        loss_scaler: The loss scaler, or None. It is not restored with --no-resume-opt.
        path: The checkpoint.

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
    """Load the weights of a task from a safetensors file, such as a model on the Hub.

    Args:
        task: The task.
        path: The safetensors file.
        name: Value of --resume, for messages.

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
