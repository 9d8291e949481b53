"""Entry point of `timm-multimix train`: training, validation and exit status."""
import argparse
import logging
import signal
import sys
from collections.abc import Sequence

import torch
from timm import utils
from timm.models import clean_state_dict

from ..build.checkpoint import read_checkpoint
from ..build.loaders import VALIDATION
from ..build.saved_weights import described, saved_weights, weights_entry
from ..build.workers import ending_workers
from ..common.console import is_first_on_machine, setup_logging
from ..common.distributed import Watchdog, lost_contact_errors
from ..common.errors import RunError, UsageError, is_dead_worker, restore_worker_errors, usage_errors
from ..common.files import unlock_folders
from .config import parse_args, recipe_text
from .fit import Interrupted, fit
from .hub import HubPush
from .loop import validate
from .resuming import check_architecture
from .run import build_run, compile_task
from .setup import Setup
from .state import RunState
from .validation import shown

_logger = logging.getLogger(__name__)

_EXIT_BY_SIGNAL = 128  # plus the signal number, as in shells


def validate_checkpoint(setup: Setup, state: RunState) -> dict[str, float]:
    """Validate the checkpoint given by --validate and return its metrics.

    Raises:
        UsageError: if the checkpoint does not fit the model.
    """
    args, task, path = setup.args, setup.task, setup.args.validate
    checkpoint = read_checkpoint(path)
    key = weights_entry(checkpoint, args.eval_weights or 'best')
    if key is None:
        raise UsageError(
            f'--eval-weights {args.eval_weights}: {path} contains only the weights '
            f'{", ".join(saved_weights(checkpoint))}.')
    with usage_errors(f'{path} does not fit --model {args.model}'):
        try:
            task.load_checkpoint_state(clean_state_dict(checkpoint[key]))
        except RuntimeError:
            check_architecture(args, checkpoint, path)
            raise
    compile_task(args, task)
    metrics = validate(setup, state, task.get_eval_model())
    setup.loaders.warn_of_unreadable(VALIDATION)
    _logger.info(f'{path}: {shown(metrics)} ({described(checkpoint, key)})')
    return metrics


def _timm_script(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the command line into the value of --timm-script and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--timm-script')
    known, rest = parser.parse_known_args(argv)
    return known.timm_script, rest


def _run(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    hub = HubPush.start(args)
    try:
        with lost_contact_errors(Watchdog(), args.dist_timeout):
            setup, state = build_run(args)
        if args.validate and not args.dry_run:
            validate_checkpoint(setup, state)
    except RunError as error:
        _logger.error(error)
        raise
    if args.dry_run:
        sys.stdout.write(recipe_text(setup.options) if utils.is_primary(args) else '')
        _logger.info('Dry run: options, data and model are valid. Nothing was written.')
    elif not args.validate:
        fit(setup, state, hub)


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
