"""Train a run to its last epoch and write its output folder."""
import argparse
import logging
import os
import shlex
import signal
from dataclasses import replace
from typing import Any

import yaml
from timm import utils

from ..build.checkpoint import read_checkpoint
from ..build.option import option_name
from ..build.saved_weights import described, saved_weights, weights_entry
from ..calibration.run import forget_calibrated, write_calibrated
from ..common.command_line import program
from ..common.distributed import lost_contact_errors
from ..common.errors import RunError, UsageError, is_dead_worker, suppress_worker_errors, usage_errors
from ..common.files import lock_folder, remove_temporary, replacing
from ..hub.export import write_config
from ..hub.summary import SUMMARY_NAME, add_row, read_summary
from .checkpoints import RunSaver, set_aside
from .checks import check_run_folder
from .config import DATA_OPTIONS, dataset_danger
from .hub import HubPush
from .loop import learning_rate, train_epoch
from .setup import Setup
from .state import RunState
from .trackers import Trackers
from .validation import share_batch_norm, validate_epoch

_logger = logging.getLogger(__name__)


def train_command(args: argparse.Namespace, folder: str, *options: str) -> str:
    """Return the command that runs the script again with the options of a run and additional ones."""
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', args.world_size)) if args.distributed else 1
    code = ['--dataset-trust-remote-code'] if args.dataset_trust_remote_code else []  # never from a config file
    code += ['--device-modules', *args.device_modules] if args.device_modules else []
    if dataset_danger(args):
        code += [part for name in DATA_OPTIONS if (value := getattr(args, name))
                 for part in (option_name(name), value) if name != 'data']
    words = ['--config', os.path.join(folder, 'args.yaml'), *options, *code]
    return f'{program("train", processes)} {shlex.join(words)}'


def _create_folder(setup: Setup) -> Setup:
    """Create and lock the output folder. Return the setup with its path."""
    with usage_errors(f'--output {setup.folder}'):
        if setup.args.experiment:
            os.makedirs(setup.folder, exist_ok=True)
        else:  # another run may have started in the same second
            setup = replace(setup, folder=utils.get_outdir(setup.folder, inc=True))
        lock_folder(setup.folder)
    return setup


def _open_folder(setup: Setup, start_epoch: int) -> RunSaver:
    """Write the options and the configuration to the output folder, and return the saver of its checkpoints."""
    args, folder = setup.args, setup.folder
    with usage_errors(f'--output {folder}'):
        check_run_folder(args)  # again: another run may have written here before the lock
        read_summary(folder)  # raises UsageError if the file is invalid
        remove_temporary(folder)
        with replacing(os.path.join(folder, 'args.yaml')) as path, open(path, 'w') as file:
            yaml.safe_dump(setup.options, file, default_flow_style=False)
        write_config(folder, args, setup.task.get_trainable_module(), setup.data_config, setup.class_to_idx)
    saver = RunSaver(setup)
    if setup.resumed_from and os.path.samefile(os.path.dirname(setup.resumed_from) or '.', folder):
        set_aside(setup, start_epoch)
        saver.restore_history(setup.resumed_from, start_epoch)
    return saver


def _write_summary(setup: Setup, epoch: int, metrics: dict, eval_metrics: dict, trackers: Trackers) -> None:
    row = dict(epoch=epoch)
    row.update((f'train_{name}', value) for name, value in metrics.items())
    row.update((f'eval_{name}', value) for name, value in eval_metrics.items())
    row['lr'] = learning_rate(setup)
    path = os.path.join(setup.folder, SUMMARY_NAME)
    try:
        add_row(path, row)
    except (OSError, UsageError) as error:  # a full disk, or a file that another program has changed
        raise RunError(f'{path} could not be written: {error}') from error
    trackers.log(row)


def _finish_epoch(state: RunState, train_metrics: dict[str, float], trackers: Trackers | None) -> bool:
    """Validate, write the summary and a checkpoint, and step the schedule. Return whether a checkpoint was due."""
    setup, epoch, done, metric = state.setup, state.epoch, state.epoch + 1, None
    state.averages = None
    share_batch_norm(setup, setup.task.get_trainable_module())
    is_milestone = done in setup.args.save_epochs
    is_due = done % setup.args.val_interval == 0 or done == setup.stop_epoch or is_milestone
    if is_due:
        eval_metrics, metric, entries = validate_epoch(state)
        if setup.loaders.evaluation is None:
            metric = train_metrics['loss']
        progress = state.state_dict()
        if state.saver is not None:
            _write_summary(setup, epoch, train_metrics, eval_metrics, trackers)
            state.saver.save_checkpoint(epoch, metric, progress, **entries)
            if is_milestone:
                state.saver.save_milestone(done)
    state.epoch = done
    if setup.scheduler is not None:
        setup.scheduler.step(done, metric)
    return is_due


def _how_to_continue(setup: Setup, saver: RunSaver) -> str:
    """Return the message with the command to continue a run that ended early."""
    latest = saver.latest()
    if latest is None:
        return 'No checkpoint has been written yet.'
    parent, name = os.path.split(setup.folder)
    named = [f'--experiment={name}'] if name.startswith('-') else ['--experiment', name]
    command = train_command(setup.args, setup.folder, '--output', parent, *named, '--resume', 'auto')
    return f'The latest checkpoint is {latest}. Continue with\n  {command}'


def _train_epochs(state: RunState, trackers: Trackers | None, hub: HubPush | None) -> None:
    """Train all remaining epochs. If the user stops the run, save a checkpoint and raise KeyboardInterrupt."""
    setup, saver = state.setup, state.saver
    state.begin_training()
    trained: dict[str, Any] | None = None  # state before validation, to save if validation is interrupted
    try:
        while (epoch := state.epoch) < setup.stop_epoch:
            train_metrics = train_epoch(state)
            trained = state.state_dict()
            is_saved = _finish_epoch(state, train_metrics, trackers)
            trained = None
            if hub is not None and is_saved:
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
        raise KeyboardInterrupt(state.stop.signal_number or signal.SIGINT) from None
    except RuntimeError as error:
        if is_dead_worker(error):
            raise RunError(f'{error} Check that there is enough memory for {setup.args.workers} --workers.') from error
        raise


def _train(state: RunState, trackers: Trackers | None, hub: HubPush | None) -> None:
    """Train all remaining epochs, with hints in errors. Signals stop the run between two updates."""
    args = state.setup.args
    if args.distributed:
        state.watchdog.watch(0.9 * args.dist_timeout)
    with state.stop:
        try:
            with lost_contact_errors(state.watchdog, args.dist_timeout):
                _train_epochs(state, trackers, hub)
        except RunError as error:
            suppress_worker_errors()
            error.hint = _how_to_continue(state.setup, state.saver) if state.saver is not None else ''
            raise
        except Exception:
            if args.distributed:
                _logger.error(f'Failed in {state.watchdog.place}.')
            raise
        finally:
            state.watchdog.end()


def _log_best(setup: Setup, saver: RunSaver) -> None:
    """Log the best checkpoint, and the commands that export and validate it."""
    path = os.path.join(setup.folder, 'model_best.pth.tar')
    message = f'Best {setup.eval_metric}: {saver.best_metric:.4g} in epoch {saver.best_epoch}, {path}'
    checkpoint = read_checkpoint(path, verify=False)
    if len(set(saved_weights(checkpoint).values())) > 1 and setup.loaders.evaluation is not None:
        entry = weights_entry(checkpoint)
        command = f'{program("hub")} export {shlex.join([setup.folder, os.path.join(setup.folder, "model")])}'
        message += f'\nMeasured with {described(checkpoint, entry)} ({entry}). Export these weights with\n  {command}'
    _logger.info(message)
    if setup.loaders.evaluation is not None:
        _logger.info('Validate it with\n  ' + train_command(setup.args, setup.folder, '--validate', path))


def fit(state: RunState, hub: HubPush | None = None) -> None:
    """Train a run to its last epoch, write its output folder and, with `hub`, push it to the Hub.

    Raises:
        KeyboardInterrupt: if the user stopped the run. A checkpoint has been saved.
        RunError: if the run cannot continue. The last checkpoint is unchanged.
    """
    setup, start_epoch, trackers = state.setup, state.epoch, None
    stop_epoch = setup.stop_epoch
    if utils.is_primary(setup.args):
        setup = state.setup = _create_folder(setup)
        state.saver = _open_folder(setup, start_epoch)
        if start_epoch < stop_epoch:
            forget_calibrated(setup.folder)
        trackers = Trackers(setup, start_epoch)
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
        _train(state, trackers, hub)
    finally:
        if trackers is not None:
            trackers.finish()
    has_best = state.saver is not None and state.saver.best_metric is not None
    if has_best and setup.loaders.calibration is not None:
        model = utils.unwrap_model(setup.task.get_eval_model())
        write_calibrated(setup.folder, model, setup.loaders.calibration, setup.autocast)
    setup.loaders.report_unreadable()
    if has_best:
        _log_best(setup, state.saver)
    if hub is not None:
        hub.finish()
