"""Entry point of `timm-multimix train`: training, validation and exit status."""
import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence

import torch
import yaml
from timm import utils
from timm.models import clean_state_dict

from ..build.checkpoint import read_checkpoint
from ..build.loaders import TRAINING, VALIDATION
from ..build.saved_weights import described, saved_weights, weights_entry
from ..build.workers import ending_workers
from ..calibration.run import forget_calibrated, write_calibrated
from ..common.command_line import program
from ..common.console import is_first_on_machine, setup_logging
from ..common.distributed import is_lost_contact, lost_contact
from ..common.errors import (
    RunError,
    UsageError,
    is_dead_worker,
    restore_worker_errors,
    suppress_worker_errors,
    usage_errors,
)
from ..common.files import lock_folder, make_folder, remove_temporary, replacing, unlock_folders
from ..hub.export import write_config
from ..hub.summary import SUMMARY_NAME, fit_columns, read_summary, trim_summary
from .branches import set_aside
from .checkpoints import RunSaver
from .checks import check_run_folder
from .config import COMMAND_LINE_ONLY, DATA_OPTIONS, dataset_danger, parse_args, recipe_text
from .hub import HubPush
from .loop import learning_rate, train_epoch, validate
from .progress import restore_progress, take_progress
from .resuming import check_architecture
from .run import Run, build_run, compile_task
from .trackers import Trackers
from .unreadable import report_totals, warn_of_unreadable
from .validation import share_batch_norm, shown, validate_epoch

_logger = logging.getLogger(__name__)

_EXIT_BY_SIGNAL = 128  # plus the signal number, as in shells


class Interrupted(Exception):
    """The user stopped the run with the signal `signal_number`."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number


def _save_args(run: Run, args_text: str) -> None:
    with replacing(os.path.join(run.folder, 'args.yaml')) as path, open(path, 'w') as file:
        file.write(args_text)


def _open_folder(run: Run, args_text: str) -> RunSaver | None:
    """Create and lock the output folder and return its saver; return None on all processes but the first."""
    if not utils.is_primary(run.args):
        return None
    with usage_errors(f'--output {run.folder}'):
        if run.args.experiment:
            os.makedirs(run.folder, exist_ok=True)
        else:
            run.folder = make_folder(run.folder)  # another run may have started in the same second
        lock_folder(run.folder)
        check_run_folder(run.args)  # again: another run may have written here before the lock
        read_summary(run.folder)  # raises UsageError if the file is invalid
        remove_temporary(run.folder)
        _save_args(run, args_text)
        write_config(run.folder, run.args, run.task.get_trainable_module(), run.data_config, run.class_to_idx)
    saver = RunSaver(
        model=run.task.get_trainable_module(),
        optimizer=run.optimizer,
        args=run.args,
        amp_scaler=run.precision.loss_scaler,
        checkpoint_dir=run.folder,
        recovery_dir=run.folder,
        decreasing=run.decreasing,
        max_history=run.args.checkpoint_hist,
        task=run.task,
    )
    saver.class_to_idx = run.class_to_idx
    if run.resumed_from and os.path.samefile(os.path.dirname(run.resumed_from) or '.', run.folder):
        saver.outdated = set_aside(run)
        saver.load_state_dict_from_checkpoint(run.resumed_from, run.start_epoch)
    with replacing(os.path.join(run.folder, SUMMARY_NAME)) as path:
        trim_summary(path, run.start_epoch)
    return saver


def _of_kind(prefix: str, names: Sequence[str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _write_summary(run: Run, epoch: int, train_metrics: dict, eval_metrics: dict | None, trackers: Trackers) -> None:
    # Loss terms that are absent in some epochs keep their column, so that all rows match the header.
    others = ('loss', 'top1', 'unreadable')
    parts = getattr(run.task, 'loss_names', [name for name in train_metrics if name not in others])
    top1 = ['top1'] if run.args.task == 'classification' else []
    columns = dict.fromkeys(['loss', *parts, *top1, 'unreadable'])
    path = os.path.join(run.folder, SUMMARY_NAME)
    lr = learning_rate(run)
    try:
        with replacing(path) as temporary:
            names = [f'train_{name}' for name in columns] + [f'eval_{name}' for name in eval_metrics or ()]
            names = fit_columns(temporary, ['epoch', *names, 'lr'])
            utils.update_summary(
                epoch,
                {name: train_metrics.get(name, '') for name in _of_kind('train_', names)},
                eval_metrics and {name: eval_metrics.get(name, '') for name in _of_kind('eval_', names)},
                filename=temporary,
                lr=lr,
            )
    except OSError as error:
        raise RunError(f'{path} could not be written: {error.strerror or error}.') from error
    except UsageError as error:  # the file was changed by another program during the run
        raise RunError(str(error)) from error
    trackers.log({
        'epoch': epoch,
        **{f'train_{name}': value for name, value in train_metrics.items()},
        **{f'eval_{name}': value for name, value in (eval_metrics or {}).items()},
        'lr': lr,
    })


def _finish_epoch(run: Run, epoch: int, train_metrics: dict, saver: RunSaver | None, trackers: Trackers | None) -> None:
    """Validate, write the summary and a checkpoint, and step the schedule."""
    share_batch_norm(run, run.task.get_trainable_module())
    done = epoch + 1
    warn_of_unreadable(run, TRAINING, f'Epoch {epoch}: ')
    is_milestone = done in run.args.save_epochs
    metric = None
    if done % run.args.val_interval == 0 or done == run.stop_epoch or is_milestone:
        validated, eval_metrics = validate_epoch(run), None
        warn_of_unreadable(run, VALIDATION, f'Epoch {epoch}: ')
        if validated is None:
            metric = train_metrics[run.eval_metric]
        else:
            eval_metrics, metric = validated.metrics, validated.metric
            _logger.info(f'Epoch {epoch}: validation  {shown(eval_metrics)}')
        progress = take_progress(run)
        if saver is not None:
            saver.metrics = validated and validated.by_entry
            _write_summary(run, epoch, train_metrics, eval_metrics, trackers)
            saver.save_checkpoint(epoch, metric, progress)
            if is_milestone:
                saver.save_milestone(done)
    run.progress = None
    if run.scheduler is not None:
        run.scheduler.step(done, metric)


def _command(run: Run, *options: str) -> str:
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', run.args.world_size)) if run.args.distributed else 1
    code = ['--dataset-trust-remote-code'] if run.args.dataset_trust_remote_code else []  # never from a config file
    code += ['--device-modules', *run.args.device_modules] if run.args.device_modules else []
    if dataset_danger(run.args):
        code += [part for name in DATA_OPTIONS if (value := getattr(run.args, name))
                 for part in (f'--{name.replace("_", "-")}', value) if name != 'data']
    config = os.path.join(run.folder, 'args.yaml')
    return f'{program("train", processes)} {shlex.join(["--config", config, *options, *code])}'


def _how_to_continue(run: Run, saver: RunSaver) -> str:
    """Return the message with the command to continue a run that ended early."""
    latest = saver.latest()
    if latest is None:
        return 'No checkpoint has been written yet.'
    parent, name = os.path.split(run.folder)
    command = _command(run, '--output', parent, '--experiment', name, '--resume', 'auto')
    return f'The latest checkpoint is {latest}. Continue with\n  {command}'


def _interrupt(run: Run, epoch: int, saver: RunSaver | None) -> None:
    """Save a recovery checkpoint if validation was interrupted, and log how to continue."""
    run.stop.ignore()
    if saver is None:
        return
    if run.progress is not None:
        saver.save_recovery(epoch, run.updates_per_epoch - 1, run.progress)
    _logger.info(f'Stopped in epoch {epoch}. {_how_to_continue(run, saver)}')


def _train(run: Run, saver: RunSaver | None, trackers: Trackers | None, hub: HubPush | None) -> None:
    run.interrupted = restore_progress(run)
    epoch = run.start_epoch
    try:
        for epoch in range(run.start_epoch, run.stop_epoch):
            train_metrics, images_per_second = train_epoch(run, epoch, saver)
            metrics = {name: value for name, value in train_metrics.items() if name != 'unreadable'}
            _logger.info(f'Epoch {epoch}: training  {shown(metrics)}  ({images_per_second:.1f} images/s)')
            _finish_epoch(run, epoch, train_metrics, saver, trackers)
            if hub is not None:
                hub.after_save(is_best=saver.best_epoch == epoch)
    except KeyboardInterrupt:
        if hub is not None:
            hub.abandon()
        suppress_worker_errors()
        _interrupt(run, epoch, saver)
        raise Interrupted(run.stop.signal_number or signal.SIGINT) from None
    except RuntimeError as error:
        if is_dead_worker(error):
            raise RunError(f'{error} Check that there is enough memory for {run.args.workers} --workers.') from error
        if is_lost_contact(error):
            raise lost_contact(error, run.watchdog.place, run.args.dist_timeout) from error
        raise


def _export_hint(run: Run, path: str) -> str:
    """Return the weight set of the metric and its export command, or '' if there is only one weight set."""
    checkpoint = read_checkpoint(path, verify=False)
    if 'metrics' not in checkpoint or len(set(saved_weights(checkpoint).values())) == 1:
        return ''
    entry = weights_entry(checkpoint)
    command = f'{program("hub")} export {shlex.join([run.folder, os.path.join(run.folder, "model")])}'
    return f'\nMeasured with {described(checkpoint, entry)} ({entry}). Export these weights for timm with\n  {command}'


def fit(run: Run, args_text: str, hub: HubPush | None = None) -> None:
    """Train a run to its last epoch and write its output folder.

    Args:
        run: The run.
        args_text: Arguments of the run, as YAML.
        hub: Pushes the run to the Hub; None to push nothing.

    Raises:
        Interrupted: if the user stopped the run. A checkpoint has been saved.
        RunError: if the run cannot continue. The last checkpoint is unchanged.
    """
    saver = _open_folder(run, args_text)
    if saver is not None and run.start_epoch < run.stop_epoch:
        forget_calibrated(run.folder)
    trackers = None if saver is None else Trackers(run)
    if hub is not None:
        hub.begin(run)
    if run.start_epoch < run.stop_epoch:
        _logger.info(
            f'Epochs {run.start_epoch} to {run.stop_epoch - 1} of {run.num_epochs}, {run.updates_per_epoch} updates '
            f'each. Output folder: {run.folder}')
    else:
        _logger.info(
            f'The run in {run.folder} is complete: {run.start_epoch} of {run.stop_epoch} epochs. To train longer, '
            f'increase {"--stop-epoch" if run.stop_epoch < run.num_epochs else "--epochs"}.')
    if run.args.distributed:
        run.watchdog.watch(0.9 * run.args.dist_timeout)
    with run.stop:
        try:
            _train(run, saver, trackers, hub)
        except RunError as error:
            suppress_worker_errors()
            if saver is not None or not error.is_shared:
                _logger.error(error)
            if saver is not None:
                _logger.info(_how_to_continue(run, saver))
            raise
        except Exception as error:
            if run.args.distributed and not isinstance(error, (Interrupted, UsageError)):
                _logger.error(f'Failed in {run.watchdog.place}.')
            raise
        finally:
            run.watchdog.end()
    if saver is not None and run.loaders.calibration is not None and saver.best_metric is not None:
        model = utils.unwrap_model(run.task.get_eval_model())
        write_calibrated(run.folder, model, run.loaders.calibration, run.precision.autocast)
    report_totals(run)
    if trackers is not None:
        trackers.finish()
    if saver is not None and saver.best_metric is not None:
        best = os.path.join(run.folder, 'model_best.pth.tar')
        _logger.info(
            f'Best {run.eval_metric}: {saver.best_metric:.4g} in epoch {saver.best_epoch}, {best}'
            f'{_export_hint(run, best)}')
        if run.loaders.evaluation is not None:
            _logger.info('Validate it with\n  ' + _command(run, '--validate', best))
    if hub is not None:
        hub.finish()


def validate_checkpoint(run: Run) -> dict[str, float]:
    """Validate the checkpoint given by --validate and return its metrics.

    Raises:
        UsageError: if the checkpoint does not fit the model.
    """
    path = run.args.validate
    checkpoint = read_checkpoint(path)
    # A checkpoint can contain a single weight set, for example of a calibrated model.
    key = weights_entry(checkpoint, run.args.eval_weights or 'best') or weights_entry(checkpoint)
    with usage_errors(f'{path} does not fit --model {run.args.model}'):
        try:
            run.task.load_checkpoint_state(clean_state_dict(checkpoint[key]))
        except RuntimeError:
            check_architecture(run.args, checkpoint, path)
            raise
    compile_task(run.args, run.task)
    metrics = validate(run, run.task.get_eval_model())
    warn_of_unreadable(run, VALIDATION)
    _logger.info(f'{path}: {shown(metrics)}')
    return metrics


def _timm_script(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the command line into the value of --timm-script and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--timm-script')
    known, rest = parser.parse_known_args(argv)
    return known.timm_script, rest


def _run(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    saved = {name: value for name, value in vars(args).items() if name not in (*COMMAND_LINE_ONLY, 'dry_run')}
    hub = HubPush.start(args)
    try:
        run = build_run(args)
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        error = lost_contact(error, 'preparing', args.dist_timeout)
        _logger.error(error)
        raise error from None
    if args.dry_run:
        sys.stdout.write(recipe_text(saved) if utils.is_primary(args) else '')
        _logger.info('Dry run: options, data and model are valid. Nothing was written.')
    elif args.validate:
        try:
            validate_checkpoint(run)
        except RunError as error:
            _logger.error(error)
            raise
    else:
        fit(run, yaml.safe_dump(saved | run.settled, default_flow_style=False), hub)


def _status(argv: Sequence[str]) -> int:
    """Run and return the exit status. All references to the run are released on return."""
    try:
        with ending_workers():
            _run(argv)
    except UsageError as error:
        if is_first_on_machine():  # all processes raise the same error
            _logger.error(error)
        return 2
    except RunError:  # already logged
        return 1
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        _logger.error(error)
        return 1
    except Interrupted as stop:
        return _EXIT_BY_SIGNAL + stop.signal_number
    except KeyboardInterrupt:
        return _EXIT_BY_SIGNAL + signal.SIGINT
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-multimix train` or train_timm.py.

    Args:
        argv: Command line arguments, by default sys.argv[1:].

    Returns:
        Exit status: 0 for success, 1 for a run that failed, 2 for a usage error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    script, rest = _timm_script(sys.argv[1:] if argv is None else argv)
    if script is not None:
        from ..patch import main as run_patched  # imports this package
        return run_patched([script, *rest])
    setup_logging()
    try:
        return _status(rest)
    finally:
        unlock_folders()
        restore_worker_errors()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == '__main__':
    sys.exit(main())
