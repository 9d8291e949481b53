"""Checkpoints of a run: timm's, written and found so that an interrupted run loses nothing."""
import argparse
import glob
import logging
import os

from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, load_checkpoint_metadata
from torch.optim import Optimizer

from .errors import UsageError

_logger = logging.getLogger(__name__)


class RunSaver(CheckpointSaver):
    """timm's CheckpointSaver, whose recovery checkpoints do not count the epoch that they interrupt as done.

    timm continues after the epoch that a checkpoint names. A recovery checkpoint is written in the middle of one, and
    continuing after it would skip the rest of its images: here that epoch is begun again, with the weights as they are.
    """

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        is_recovery = os.path.basename(save_path).startswith(self.recovery_prefix)
        super()._save(save_path, epoch - is_recovery, metric)


def newest_checkpoint(folder: str) -> str | None:
    """The checkpoint of a run to continue from: the last complete epoch, or an interruption after it."""
    paths = [os.path.join(folder, 'last.pth.tar'), *glob.glob(os.path.join(glob.escape(folder), 'recovery-*.pth.tar'))]
    return max(filter(os.path.isfile, paths), key=os.path.getmtime, default=None)


def read_checkpoint(path: str) -> dict:
    """What a checkpoint holds, read as data only.

    Raises:
        UsageError: if it is not a checkpoint of a model.
    """
    try:
        checkpoint = load_checkpoint_metadata(path)
    except Exception as error:  # of many kinds: a truncated archive, another format, objects that are not data
        raise UsageError(
            f'{path} is damaged, or no PyTorch checkpoint that can be read as data only: {error}') from error
    if not isinstance(checkpoint, dict) or not any(key in checkpoint for key in ('state_dict', 'model')):
        raise UsageError(f'{path} is not a training checkpoint: it has no state_dict.')
    return checkpoint


def resume(args: argparse.Namespace, task: TrainingTask, optimizer: Optimizer, loss_scaler, path: str) -> int | None:
    """Bring a task and its optimizer to the state in a checkpoint.

    Returns:
        The epoch to continue with, None if the checkpoint does not know it.

    Raises:
        UsageError: if the checkpoint is damaged, or of another model or optimizer.
    """
    architecture = read_checkpoint(path).get('arch')
    if architecture not in (None, args.model):
        raise UsageError(f'{path} is a checkpoint of {architecture}, not of --model {args.model}.')
    keep = not args.no_resume_opt
    try:
        epoch = resume_task_checkpoint(
            task, path, optimizer if keep else None, loss_scaler if keep else None, log_info=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path} does not fit this run: {error}') from error
    _logger.info(f'Continuing from {path}' + ('' if epoch is None else f' with epoch {epoch}.'))
    return epoch


def setup_ema(args: argparse.Namespace, task: TrainingTask, path: str | None) -> None:
    """Start the average of the weights, from a checkpoint if one is given."""
    task.setup_ema(
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device='cpu' if args.model_ema_force_cpu else None,
    )
    if path:
        load_task_ema_checkpoint(task, path)
