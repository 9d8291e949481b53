"""Write and select the checkpoints of a run."""
import glob
import itertools
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import itemgetter
from typing import Any

import torch
from timm.utils import CheckpointSaver

from ..build.checkpoint import read_checkpoint
from ..build.saved_weights import selects_alike
from ..common.errors import RunError, UsageError, causes, raise_if_interrupted
from ..common.files import create, duplicate, replace
from ..hub.summary import SUMMARY_NAME
from .loss_guard import normalization_statistics
from .setup import Setup

_logger = logging.getLogger(__name__)

_EXTENSION = '.pth.tar'
# Checkpoints that a run can continue from. Others contain weights that were changed after training.
_PATTERNS = ('last', 'recovery-*', 'checkpoint-*', 'milestone-*', 'model_best')


def holds_checkpoints(folder: str) -> bool:
    """Return whether a folder contains complete checkpoint files, readable or not."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return any(name.endswith(_EXTENSION) and not name.endswith('tmp' + _EXTENSION) for name in names)


def find_checkpoints(folder: str) -> list[str]:
    """Return the paths of the checkpoints in a folder that a run can continue from, readable or not."""
    stem = glob.escape(folder)
    return [path for name in _PATTERNS for path in glob.glob(os.path.join(stem, name + _EXTENSION))]


def _not_finite(weights: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that contain infinity or NaN."""
    return [name for name, value in weights.items() if isinstance(value, torch.Tensor) and not value.isfinite().all()]


class RunSaver(CheckpointSaver):
    """timm's CheckpointSaver with atomic writes and the state that a run needs to continue exactly.

    In addition to timm's entries a checkpoint contains 'progress' (RunState.state_dict()), 'class_to_idx' and, if it
    has a metric, 'eval_weights' and 'metrics' (all metrics of each validated weight entry). 'args' is a dict, so that
    the file can be loaded with weights_only=True. Tasks store additional state in timm's 'task_state' (get_task_state).

    timm continues with the epoch after the 'epoch' of a checkpoint. A recovery checkpoint is written in the middle of
    an epoch and therefore stores the previous epoch.
    """
    _replace = staticmethod(replace)
    _duplicate = staticmethod(duplicate)

    def __init__(self, setup: Setup):
        super().__init__(
            model=setup.task.get_trainable_module(), optimizer=setup.optimizer, args=setup.args,
            amp_scaler=setup.loss_scaler, checkpoint_dir=setup.folder, recovery_dir=setup.folder,
            decreasing=setup.decreasing, max_history=setup.args.checkpoint_hist, task=setup.task)
        self.class_to_idx = setup.class_to_idx
        self._entries: dict[str, Any] = {}  # entries of the checkpoint that is being written
        # Buffers that are not finite by design, such as an attention mask with -inf.
        module = self.unwrap_fn(self.model)
        self._masks = {*_not_finite(dict(module.named_buffers()))} - normalization_statistics(module).keys()

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
        entries: dict[str, Any] = dict(self._entries, class_to_idx=self.class_to_idx, metric=metric)
        state.update((name, value) for name, value in entries.items() if value is not None)
        return state

    def _check_weights(self, state: Mapping[str, Any]) -> None:
        """Raise RunError if weights are not finite, before they replace an earlier checkpoint."""
        if not self.args.max_nonfinite:
            return
        for entry, weights in state.items():
            if not entry.startswith('state_dict'):
                continue
            if lost := [name for name in _not_finite(weights) if name not in self._masks]:
                raise RunError(
                    f'The weights are not finite ({lost[0]} in {entry}) and are not saved. Lower the '
                    'learning rate, or clip gradients (--clip-grad).')

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        is_recovery = os.path.basename(save_path).startswith(self.recovery_prefix)
        state = self._state(epoch - is_recovery, metric)
        self._check_weights(state)
        try:
            with create(save_path) as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                os.unlink(save_path)
            raise_if_interrupted(error)
            # PyTorch's writer replaces the operating system's error by its own.
            reasons = [cause.strerror for cause in causes(error) if isinstance(cause, OSError) and cause.strerror]
            reason = (reasons or ['the disk is full or cannot be written to'])[0]
            raise RunError(f'{save_path} could not be written: {reason}.') from error
        finally:
            self._entries = {}

    def save_recovery(self, epoch: int, batch_idx: int = 0, progress: dict[str, Any] | None = None) -> None:
        """Save a recovery checkpoint as timm does, then remove recovery checkpoints of earlier processes."""
        self._entries = dict(progress=progress)
        super().save_recovery(epoch, batch_idx)
        pattern = os.path.join(glob.escape(self.recovery_dir), f'{self.recovery_prefix}-*{self.extension}')
        for path in {*glob.glob(pattern)} - {self.curr_recovery_file, self.prev_recovery_file}:
            with suppress(OSError):
                os.remove(path)

    def save_checkpoint(
            self, epoch: int, metric: float | None = None, progress: dict[str, Any] | None = None, **entries: Any,
    ) -> tuple[float | None, int | None]:
        """Save a checkpoint as timm does. NaN metrics are treated as None. `entries` are added if there is a metric."""
        if metric is not None and math.isnan(metric):
            metric, entries = None, {}
        self._entries = dict(entries, progress=progress)
        return super().save_checkpoint(epoch, metric)

    def latest(self) -> str | None:
        """Return the checkpoint that --resume auto would select. Checksums are not verified."""
        return next((path for _, path in _by_progress(find_checkpoints(self.checkpoint_dir))), None)

    def restore_history(self, source: str, start_epoch: int) -> None:
        """Rank the checkpoints before start_epoch in the folder of a run, and restore a lost or damaged model_best.

        `source`, the checkpoint that the run continues from, may be the only one of its epoch.
        """
        best = os.path.join(self.checkpoint_dir, 'model_best' + self.extension)
        pattern = os.path.join(glob.escape(self.checkpoint_dir), f'{self.save_prefix}-*{self.extension}')
        found = []
        recorded: dict[str, Any] = {}
        for path in dict.fromkeys([best, source, *glob.glob(pattern)]):
            with suppress(UsageError, OSError):  # damaged or missing
                checkpoint = read_checkpoint(path, verify=False)
                epoch, metric = checkpoint.get('epoch'), self._metric(checkpoint)
                if epoch is not None and epoch < start_epoch:
                    found.append((epoch, metric, path))
                if path == source and selects_alike(checkpoint, self.args):
                    recorded = checkpoint.get('saver') or {}
                elif path == source and checkpoint.get('metric') is not None:
                    _logger.warning(
                        'The best checkpoint was selected by another metric or by other weights. The next epochs '
                        'select a new one.')
        for epoch, metric, path in sorted(found, key=itemgetter(0)):
            if path == self._checkpoint_path(epoch):
                self._track_checkpoint(path, epoch, metric, update_best_file=False)
        self.best_metric = self.best_epoch = None
        sign = 1 if self.decreasing else -1
        ranked = [entry for entry in found if entry[1] is not None]
        for epoch, metric, path in sorted(ranked, key=lambda entry: (sign * entry[1], entry[0])):
            with suppress(UsageError):
                read_checkpoint(path)
                if path != best:
                    self._duplicate(path, best)
                self.best_metric, self.best_epoch = metric, epoch
                break
        self._report_lost_best(recorded.get('best_metric'), recorded.get('best_epoch'), start_epoch)

    def _report_lost_best(self, metric: float | None, epoch: int | None, start_epoch: int) -> None:
        """Warn if the best checkpoint was lost, with the metric and the epoch before start_epoch that it had."""
        if metric is None or epoch is None or epoch >= start_epoch:
            return
        sign = 1 if self.decreasing else -1
        if self.best_metric is None or (sign * metric, epoch) < (sign * self.best_metric, self.best_epoch):
            now = 'The next epoch replaces it.' if self.best_epoch is None else f'Epoch {self.best_epoch} replaces it.'
            _logger.warning(f'The best checkpoint, of epoch {epoch}, is missing or damaged. {now}')

    def _metric(self, checkpoint: Mapping[str, Any]) -> float | None:
        """Return the metric of a checkpoint; None if it has none, or if the run selects by another metric."""
        metric = checkpoint.get('metric')
        return None if metric is None or math.isnan(metric) or not selects_alike(checkpoint, self.args) else metric


def position(path: str) -> tuple[int, bool, int, float]:
    """Return last finished epoch, whether the next one has begun, its trained batches, and the modification time.

    Checkpoints of a run are compared by them. The time decides if batches were not counted. At the end of an epoch it
    is 0.
    """
    checkpoint = read_checkpoint(path, verify=False)
    epoch, progress = checkpoint.get('epoch'), checkpoint.get('progress') or {}
    written = 0 if progress.get('in_epoch') is False else os.path.getmtime(path)  # copies have other times
    return -1 if epoch is None else epoch, bool(progress.get('in_epoch')), progress.get('consumed', 0), written


def _by_progress(paths: Iterable[str]) -> list[tuple[tuple, str]]:
    """Return the readable checkpoints with their positions, the furthest first; equal ones keep their order."""
    found = []
    for path in paths:
        try:
            found.append((position(path), path))
        except UsageError as error:
            _logger.warning(f'{error} It is skipped.')
    return sorted(found, key=lambda entry: entry[0], reverse=True)


def newest_checkpoint(folder: str) -> str | None:
    """Return the furthest intact checkpoint in the folder of a run, None if the folder contains no checkpoints.

    Raises:
        UsageError: if there are checkpoints but none can be read, or none of them is of a run.
    """
    paths = find_checkpoints(folder)
    if not paths and holds_checkpoints(folder):
        raise UsageError(
            f'--resume auto: {folder} contains weights, but no checkpoint that a run can continue from. Choose another '
            '--experiment.')
    for _, path in _by_progress(paths):
        try:
            read_checkpoint(path)
            return path
        except UsageError as error:
            _logger.warning(f'{error} Falling back to an earlier one.')
    if paths:
        raise UsageError(
            f'--resume auto: none of the {len(paths)} checkpoints in {folder} can be read. Remove the folder or choose '
            'another --experiment to start a new run.')
    return None


def set_aside(setup: Setup, start_epoch: int) -> None:
    """Move the checkpoints that a continued run will replace to a subfolder, so that they are not selected any more.

    These are the checkpoints later than its start: with --start-epoch also the one that it continues from. They are
    moved to superseded-1 (superseded-2, ...) in the run folder, with a copy of summary.csv.
    """
    start = position(setup.resumed_from)
    if setup.args.start_epoch is not None:
        start = start_epoch - 1, False, 0, math.inf
    later = [path for place, path in _by_progress(find_checkpoints(setup.folder)) if place > start]
    if not later:
        return
    paths = (os.path.join(setup.folder, f'superseded-{number}') for number in itertools.count(1))
    folder = next(path for path in paths if not os.path.exists(path))
    os.mkdir(folder)
    summary = os.path.join(setup.folder, SUMMARY_NAME)
    if os.path.exists(summary):
        shutil.copyfile(summary, os.path.join(folder, SUMMARY_NAME))
    for path in later:
        os.replace(path, os.path.join(folder, os.path.basename(path)))
    _logger.warning(
        f'This run continues in epoch {start_epoch}. {len(later)} later checkpoints in {setup.folder} are moved to '
        f'{folder}.')
