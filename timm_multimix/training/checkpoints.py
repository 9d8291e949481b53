"""Checkpoints of a run: timm's, written and found so that an interrupted run loses nothing."""
import argparse
import glob
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import load_state_dict
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, load_checkpoint_metadata
from torch.optim import Optimizer

from .errors import RunError, UsageError, blame, is_dead_worker
from .files import create, duplicate, replace
from .saved_weights import saved_weights

_logger = logging.getLogger(__name__)

_EXTENSION = '.pth.tar'
_NO_CHECKPOINT = 'it is no PyTorch checkpoint'
_OTHER_WEIGHTS = ('.safetensors', '.npz', '.npy')  # that timm reads, too
# Options that a checkpoint's optimizer keeps in its parameter groups, from where timm's schedulers take them.
_OPTIMIZER_OPTIONS = ('lr', 'weight_decay', 'momentum', 'opt_eps', 'opt_betas', 'layer_decay')
# Prefixes of the options of the objective, which the card of a run lists for each of its parts.
_OBJECTIVE = ('multimix', 'no_multimix', 'mixup', 'cutmix', 'loss', 'smoothing', 'bce_', 'jsd_', 'asl_', 'poly_',
              'twoway_', 'db_', 'kd_', 'distill_loss', 'task_loss')
# What a run can continue from. Other checkpoints may lie beside them, of weights changed after training.
_PATTERNS = ('last', 'recovery-*', 'checkpoint-*', 'milestone-*', 'model_best')


def _why_not_written(error: BaseException) -> str:
    """PyTorch's writer hides what the system said."""
    if is_dead_worker(error):
        return str(error).strip()
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return 'the disk is full or cannot be written to'


class RunSaver(CheckpointSaver):
    """timm's CheckpointSaver, with all that a run needs to continue exactly, and files that are never half-written.

    Beside timm's entries a checkpoint holds 'progress' (see progress.py), and where it has a metric 'metric_of' and
    'metrics'. 'args' are a dict: nothing in the file is more than data. Whatever else a task has to keep it puts into
    timm's 'task_state' (get_task_state).

    timm continues after the epoch that a checkpoint names. A recovery checkpoint is written in the middle of one, and
    names the epoch before it.

    Attributes:
        progress: What the next checkpoint says of the place in the run.
        metric_of: Which entry of the checkpoint gave its metric; set by whoever validates several sets of weights.
        metrics: All metrics of each of them, by the entry.
        class_to_idx: Class names and their indices, None if they are not known.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.progress: dict[str, Any] | None = None
        self.metric_of: str | None = None
        self.metrics: dict[str, dict[str, float]] | None = None
        self.class_to_idx: dict[str, int] | None = None

    def _recoveries(self) -> list[str]:
        return glob.glob(os.path.join(
            glob.escape(self.recovery_dir), f'{self.recovery_prefix}-*{self.extension}'))

    def _state(self, epoch: int, metric: float | None) -> dict[str, Any]:
        state = dict(
            epoch=epoch,
            arch=self.args.model,
            args=vars(self.args),
            version=2,
            optimizer=self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn),
            **self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn),
            saver=self.state_dict(epoch, metric),
        )
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        entries = dict(progress=self.progress, class_to_idx=self.class_to_idx)
        if metric is not None:
            entries.update(metric=metric, metric_of=self.metric_of, metrics=self.metrics)
        state.update((name, value) for name, value in entries.items() if value is not None)
        return state

    def _check_weights(self) -> None:
        """Weights that are lost must not replace good ones."""
        if not self.args.max_nonfinite:
            return
        module = self.task.get_trainable_module()
        fine = [parameter.detach().isfinite().all() for parameter in module.parameters()]
        fine += [~buffer.isnan().any() for buffer in module.buffers() if buffer.is_floating_point()]
        if fine and not torch.stack([flag.to(fine[0].device) for flag in fine]).all():
            raise RunError(
                'The weights are not finite any more, so they are not saved. Lower the learning rate, or clip '
                'gradients (--clip-grad).')

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        is_recovery = os.path.basename(save_path).startswith(self.recovery_prefix)
        self._check_weights()
        state = self._state(epoch - is_recovery, metric)
        try:
            with create(save_path) as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                os.unlink(save_path)
            raise RunError(f'{save_path} could not be written: {_why_not_written(error)}.') from error

    def save_recovery(self, epoch: int, batch_idx: int = 0, progress: dict[str, Any] | None = None) -> None:
        """As timm's, at a place in the epoch. Only now, with a new one written, those of an earlier process go."""
        self.progress = progress
        super().save_recovery(epoch, batch_idx)
        for path in {*self._recoveries()} - {self.curr_recovery_file, self.prev_recovery_file}:
            with suppress(OSError):
                os.remove(path)

    def save_checkpoint(self, epoch: int, metric: float | None = None, progress: dict[str, Any] | None = None):
        """As timm's, at the end of an epoch."""
        self.progress = progress
        return super().save_checkpoint(epoch, metric)

    def latest(self) -> str | None:
        """The checkpoint written last, to tell the user."""
        paths = [*self._recoveries(), os.path.join(self.checkpoint_dir, 'last' + self.extension)]
        return max(filter(os.path.isfile, paths), key=os.path.getmtime, default=None)

    def _replace(self, src: str, dst: str) -> None:
        replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        duplicate(src, dst)

    def load_state_dict_from_checkpoint(self, checkpoint_path: str) -> bool:
        """As timm's, and the best checkpoint is there again if it was lost or damaged."""
        if not super().load_state_dict_from_checkpoint(checkpoint_path):
            return False
        epoch, metric = load_checkpoint_metadata(checkpoint_path)['saver']['pending']
        best = os.path.join(self.checkpoint_dir, 'model_best' + self.extension)
        if metric is not None and (self.best_metric is None or self.cmp(metric, self.best_metric)):
            self.best_metric, self.best_epoch = metric, epoch
        if self.best_metric is not None and _epoch_of(best) != self.best_epoch:
            copies = [checkpoint_path] if epoch == self.best_epoch and metric is not None else []
            copies.append(self._checkpoint_path(self.best_epoch))
            good = next((path for path in copies if _epoch_of(path) == self.best_epoch), None)
            if good is not None:
                self._duplicate(good, best)
            else:
                _logger.warning(
                    f'The best checkpoint, of epoch {self.best_epoch}, is lost. The best from here on takes its place.')
                self.best_metric = self.best_epoch = None
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As timm's, but the names it keeps, and may remove one day, are those of checkpoints in this folder."""
        name = re.compile(re.escape(self.save_prefix) + r'-\d+' + re.escape(self.extension))
        files = [(file, metric) for file, metric in state_dict.get('checkpoint_files', ()) if name.fullmatch(file)]
        super().load_state_dict({**state_dict, 'checkpoint_files': files})


def _why_damaged(path: str) -> str | None:
    """What is wrong with the bytes of a file, None if they are as they were written. PyTorch does not check."""
    if os.path.getsize(path) == 0:
        return 'it is empty'
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return None if broken is None else f'it is damaged ({broken} differs from its checksum)'
    with open(path, 'rb') as file:
        if file.read(4) == b'PK\x03\x04':
            return 'it is truncated'
    return None  # the format before PyTorch 1.6, or something else: reading it will tell


def _read(path: str, verify: bool) -> tuple[Any, str | None]:
    """What PyTorch saved in a file, read as data only, or why it cannot be read."""
    try:
        reason = _why_damaged(path) if verify else None
        return (load_checkpoint_metadata(path) if reason is None else None), reason
    except (RuntimeError, pickle.UnpicklingError) as error:
        is_foreign = 'weights' in str(error).replace(path, '').lower()  # as PyTorch says it
        return None, 'it holds objects that are not data' if is_foreign else _NO_CHECKPOINT
    except Exception:  # of many kinds, from unpickling something else
        return None, 'it is no PyTorch checkpoint, or a part of one'


def check_weights_file(path: str) -> None:
    """Check that a file that timm did not load holds weights, of whatever model.

    Raises:
        UsageError: if it is damaged, or of another kind.
    """
    if path.endswith(_OTHER_WEIGHTS):
        return
    _, reason = _read(path, verify=True)
    if reason == _NO_CHECKPOINT:  # or one of the format before PyTorch 1.6
        with suppress(Exception):
            load_state_dict(path)
            return
    if reason is not None:
        raise UsageError(f'{path} holds no weights: {reason}.')


def read_checkpoint(path: str, verify: bool = True) -> dict:
    """What a checkpoint holds, read as data only.

    Args:
        path: The file.
        verify: Read all of it and compare checksums. Else only what is no tensor is sure to be as it was written.

    Raises:
        UsageError: if it is not a checkpoint of a model, or not as it was written.
    """
    checkpoint, reason = _read(path, verify)
    if reason is None and (
            not isinstance(checkpoint, dict) or not any(key in checkpoint for key in ('state_dict', 'model'))):
        reason = 'it has no state_dict'
    if reason is not None:
        raise UsageError(f'{path} is not a training checkpoint: {reason}.')
    return checkpoint


def _epoch_of(path: str) -> int | None:
    """Epoch of a checkpoint at whose end it was written, None if it is not there or not as it was written."""
    try:
        return read_checkpoint(path).get('epoch')
    except (UsageError, OSError):
        return None


def _by_progress(paths: Iterable[str]) -> Iterator[str]:
    """Those that look like checkpoints, the furthest first; of copies the first of the paths."""
    found = []
    for path in paths:
        try:
            checkpoint = read_checkpoint(path, verify=False)
            epoch, progress = checkpoint.get('epoch', -1), checkpoint.get('progress') or {}
            is_copy = progress.get('in_epoch') is False  # of the same moment as others of its epoch
            found.append((
                epoch, bool(progress.get('in_epoch')), progress.get('consumed', 0),
                0 if is_copy else os.path.getmtime(path), path))
        except (UsageError, AttributeError, TypeError) as error:
            _logger.warning(f'{error} It is left out.')
    return (path for *_, path in sorted(found, key=lambda entry: entry[:-1], reverse=True))


def newest_checkpoint(folder: str) -> str | None:
    """The checkpoint of a run to continue from: the one that is furthest, of those that are as they were written.

    Returns:
        Its path, None if there are no checkpoints at all.

    Raises:
        UsageError: if there are some, and none is good.
    """
    stem = glob.escape(folder)
    paths = [path for name in _PATTERNS for path in glob.glob(os.path.join(stem, name + _EXTENSION))]
    if not paths:
        return None
    for path in _by_progress(paths):
        try:
            read_checkpoint(path)
        except UsageError as error:
            _logger.warning(f'{error} Falling back to an earlier one.')
        else:
            return path
    raise UsageError(
        f'--resume auto: none of the {len(paths)} checkpoints in {folder} can be read. Remove the folder or choose '
        'another --experiment to begin again.')


def check_architecture(args: argparse.Namespace, checkpoint: dict[str, Any], path: str) -> None:
    """Check that a checkpoint is of the run's model, if it says.

    Raises:
        UsageError: if not.
    """
    architecture = checkpoint.get('arch')
    if architecture not in (None, args.model):
        raise UsageError(f'{path} is a checkpoint of {architecture}, not of --model {args.model}.')


def _settle_changes(args: argparse.Namespace, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Say which options a run continues with others than the checkpoint was trained with, if it says: those of the
    loss, which count from here on, and those of the optimizer, which do not and are set back to what is true.

    Returns:
        The options that were set back.
    """
    before = checkpoint.get('args') or {}
    before = vars(before) if isinstance(before, argparse.Namespace) else before

    def changed(names: Iterable[str]) -> list[str]:
        return [name for name in names if name in before and before[name] != getattr(args, name)]

    def told(names: Iterable[str]) -> str:
        return ', '.join(
            f'--{name.replace("_", "-")} was {before[name]} and is {getattr(args, name)}' for name in names)

    if objective := changed(name for name in vars(args) if name.startswith('multimix')):
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
    before = checkpoint.get('args') or {}
    before = vars(before) if isinstance(before, argparse.Namespace) else before
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
    settled = _settle_changes(args, checkpoint)
    keep = not args.no_resume_opt
    try:
        epoch = resume_task_checkpoint(
            task, path, optimizer if keep else None, loss_scaler if keep else None, log_info=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path} does not fit this run: {error}') from error
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
    with blame(f'--resume {name} does not fit this model'):
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
        load_task_ema_checkpoint(task, path)
