"""Train a run to its last epoch and write its output folder."""
import logging
import os
import signal
from typing import Any, NamedTuple

import yaml
from timm import utils

from ..build.loaders import TRAINING, VALIDATION
from ..build.saved_weights import selecting_weights
from ..calibration.run import forget_calibrated, write_calibrated
from ..common.distributed import lost_contact_errors
from ..common.errors import RunError, UsageError, is_dead_worker, suppress_worker_errors, usage_errors
from ..common.files import lock_folder, remove_temporary, replacing
from ..hub.export import write_config
from ..hub.summary import SUMMARY_NAME, add_row, read_summary, trim_summary
from .checkpoints import RunSaver, set_aside
from .checks import check_run_folder
from .hints import export_hint, train_command
from .hub import HubPush
from .loop import learning_rate, train_epoch
from .setup import Setup
from .state import RunState
from .trackers import Trackers
from .validation import share_batch_norm, shown, validate_epoch

_logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The user stopped the run with the signal `signal_number`."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number


class _Outputs(NamedTuple):
    """Outputs of a run. Only the first process has them."""
    saver: RunSaver
    trackers: Trackers
    hub: HubPush | None


def _open_folder(setup: Setup, start_epoch: int) -> RunSaver | None:
    """Create and lock the output folder and return its saver; return None on all processes but the first."""
    args, folder, module = setup.args, setup.folder, setup.task.get_trainable_module()
    if not utils.is_primary(args):
        return None
    with usage_errors(f'--output {folder}'):
        os.makedirs(folder, exist_ok=True)
        lock_folder(folder)
        check_run_folder(args)  # again: another run may have written here before the lock
        read_summary(folder)  # raises UsageError if the file is invalid
        remove_temporary(folder)
        with replacing(os.path.join(folder, 'args.yaml')) as path, open(path, 'w') as file:
            yaml.safe_dump(setup.options, file, default_flow_style=False)
        write_config(folder, args, module, setup.data_config, setup.class_to_idx)
    saver = RunSaver(
        model=module,
        optimizer=setup.optimizer,
        args=args,
        amp_scaler=setup.loss_scaler,
        checkpoint_dir=folder,
        recovery_dir=folder,
        decreasing=setup.decreasing,
        max_history=args.checkpoint_hist,
        task=setup.task,
    )
    saver.class_to_idx = setup.class_to_idx
    if setup.resumed_from and os.path.samefile(os.path.dirname(setup.resumed_from) or '.', folder):
        saver.outdated = set_aside(setup, start_epoch)
        saver.load_state_dict_from_checkpoint(setup.resumed_from, start_epoch)
    with replacing(os.path.join(folder, SUMMARY_NAME)) as path:
        trim_summary(path, start_epoch)
    return saver


def _write_summary(setup: Setup, epoch: int, metrics: dict, eval_metrics: dict | None, trackers: Trackers) -> None:
    # Loss terms that are absent in some epochs keep their column, so that all rows match the header.
    others = ('loss', 'top1', 'unreadable')
    parts = getattr(setup.task, 'loss_names', [name for name in metrics if name not in others])
    top1 = ['top1'] if setup.args.task == 'classification' else []
    row = dict(epoch=epoch)
    row.update((f'train_{name}', metrics.get(name, '')) for name in ('loss', *parts, *top1, 'unreadable'))
    row.update((f'eval_{name}', value) for name, value in (eval_metrics or {}).items())
    row['lr'] = learning_rate(setup)
    path = os.path.join(setup.folder, SUMMARY_NAME)
    try:
        with replacing(path) as temporary:
            add_row(temporary, row)
    except OSError as error:
        raise RunError(f'{path} could not be written: {error.strerror or error}.') from error
    except UsageError as error:  # the file was changed by another program during the run
        raise RunError(str(error)) from error
    trackers.log({name: value for name, value in row.items() if value != ''})


def _finish_epoch(setup: Setup, state: RunState, train_metrics: dict[str, float], outputs: _Outputs | None) -> None:
    """Validate, write the summary and a checkpoint, and step the schedule."""
    epoch, done, metric = state.epoch, state.epoch + 1, None
    state.averages = None
    share_batch_norm(setup, setup.task.get_trainable_module())
    setup.loaders.warn_of_unreadable(TRAINING, f'Epoch {epoch}: ')
    is_milestone = done in setup.args.save_epochs
    if done % setup.args.val_interval == 0 or done == setup.stop_epoch or is_milestone:
        validated, eval_metrics, entries = validate_epoch(setup, state), None, {}
        setup.loaders.warn_of_unreadable(VALIDATION, f'Epoch {epoch}: ')
        if validated is None:
            metric = train_metrics[setup.eval_metric]
        else:
            eval_metrics, metric = validated.metrics, validated.metric
            entries = dict(eval_weights=selecting_weights(setup.args), metrics=validated.by_entry)
            _logger.info(f'Epoch {epoch}: validation  {shown(eval_metrics)}')
        progress = state.state_dict()
        if outputs is not None:
            _write_summary(setup, epoch, train_metrics, eval_metrics, outputs.trackers)
            outputs.saver.save_checkpoint(epoch, metric, progress, **entries)
            if is_milestone:
                outputs.saver.save_milestone(done)
    state.epoch = done
    if setup.scheduler is not None:
        setup.scheduler.step(done, metric)


def _how_to_continue(setup: Setup, saver: RunSaver) -> str:
    """Return the message with the command to continue a run that ended early."""
    latest = saver.latest()
    if latest is None:
        return 'No checkpoint has been written yet.'
    parent, name = os.path.split(setup.folder)
    command = train_command(
        setup.args, setup.folder, '--output', parent, '--experiment', name, '--resume', 'auto')
    return f'The latest checkpoint is {latest}. Continue with\n  {command}'


def _train(setup: Setup, state: RunState, outputs: _Outputs | None) -> None:
    saver, _, hub = outputs or (None, None, None)
    state.begin_training()
    trained: dict[str, Any] | None = None  # state before validation, to save if validation is interrupted
    try:
        while (epoch := state.epoch) < setup.stop_epoch:
            train_metrics, images_per_second = train_epoch(setup, state, saver)
            metrics = {name: value for name, value in train_metrics.items() if name != 'unreadable'}
            _logger.info(f'Epoch {epoch}: training  {shown(metrics)}  ({images_per_second:.1f} images/s)')
            trained = state.state_dict()
            _finish_epoch(setup, state, train_metrics, outputs)
            trained = None
            if hub is not None:
                hub.after_save(is_best=saver.best_epoch == epoch)
    except KeyboardInterrupt:
        if hub is not None:
            hub.abandon()
        suppress_worker_errors()
        state.stop.ignore()
        if saver is not None:
            if trained is not None:
                saver.save_recovery(epoch, setup.updates_per_epoch - 1, trained)
            _logger.info(f'Stopped in epoch {epoch}. {_how_to_continue(setup, saver)}')
        raise Interrupted(state.stop.signal_number or signal.SIGINT) from None
    except RuntimeError as error:
        if is_dead_worker(error):
            raise RunError(f'{error} Check that there is enough memory for {setup.args.workers} --workers.') from error
        raise


def _train_with_messages(setup: Setup, state: RunState, outputs: _Outputs | None) -> None:
    """Train, and log errors and how to continue. Signals stop the run between two updates."""
    if setup.args.distributed:
        state.watchdog.watch(0.9 * setup.args.dist_timeout)
    with state.stop:
        try:
            with lost_contact_errors(state.watchdog, setup.args.dist_timeout):
                _train(setup, state, outputs)
        except RunError as error:
            suppress_worker_errors()
            if outputs is not None or not error.is_shared:
                _logger.error(error)
            if outputs is not None:
                _logger.info(_how_to_continue(setup, outputs.saver))
            raise
        except Exception as error:
            if setup.args.distributed and not isinstance(error, (Interrupted, UsageError)):
                _logger.error(f'Failed in {state.watchdog.place}.')
            raise
        finally:
            state.watchdog.end()


def _log_best(setup: Setup, saver: RunSaver) -> None:
    best = os.path.join(setup.folder, 'model_best.pth.tar')
    _logger.info(
        f'Best {setup.eval_metric}: {saver.best_metric:.4g} in epoch {saver.best_epoch}, {best}'
        f'{export_hint(setup.folder, best)}')
    if setup.loaders.evaluation is not None:
        _logger.info('Validate it with\n  ' + train_command(setup.args, setup.folder, '--validate', best))


def fit(setup: Setup, state: RunState, hub: HubPush | None = None) -> None:
    """Train a run to its last epoch and write its output folder.

    Args:
        setup: Setup of the run, from build_run.
        state: State of the run.
        hub: Pushes the run to the Hub; None to push nothing.

    Raises:
        Interrupted: if the user stopped the run. A checkpoint has been saved.
        RunError: if the run cannot continue. The last checkpoint is unchanged.
    """
    start_epoch, stop_epoch = state.epoch, setup.stop_epoch
    saver, outputs = _open_folder(setup, start_epoch), None
    if saver is not None:
        if start_epoch < stop_epoch:
            forget_calibrated(setup.folder)
        outputs = _Outputs(saver, Trackers(setup, start_epoch), hub)
    if hub is not None:
        hub.begin(setup)
    if start_epoch < stop_epoch:
        _logger.info(
            f'Epochs {start_epoch} to {stop_epoch - 1} of {setup.num_epochs}, {setup.updates_per_epoch} updates each. '
            f'Output folder: {setup.folder}')
    else:
        _logger.info(
            f'The run in {setup.folder} is complete: {start_epoch} of {stop_epoch} epochs. To train longer, increase '
            f'{"--stop-epoch" if stop_epoch < setup.num_epochs else "--epochs"}.')
    try:
        _train_with_messages(setup, state, outputs)
    finally:
        if outputs is not None:
            outputs.trackers.finish()
    has_best = saver is not None and saver.best_metric is not None
    if has_best and setup.loaders.calibration is not None:
        model = utils.unwrap_model(setup.task.get_eval_model())
        try:
            write_calibrated(setup.folder, model, setup.loaders.calibration, setup.autocast)
        except RunError as error:
            _logger.error(error)
            raise
    setup.loaders.report_unreadable()
    if has_best:
        _log_best(setup, saver)
    if hub is not None:
        hub.finish()
