"""Entry point of `timm-multimix train`."""
import argparse
import logging
import sys
from collections.abc import Sequence

import torch
from timm import utils

from ..build.workers import ending_workers
from ..common.command_line import exit_status
from ..common.distributed import Watchdog, lost_contact_errors
from ..common.errors import restore_worker_errors
from ..common.files import unlock_folders
from ..patch import main as run_patched
from .config import parse_args, recipe_text
from .fit import fit
from .hub import HubPush
from .run import build_run
from .validation import validate_checkpoint

_logger = logging.getLogger(__name__)


def _run(argv: Sequence[str]) -> None:
    logging.getLogger('timm').setLevel(logging.NOTSET)  # with timm's messages about pretrained weights
    args = parse_args(argv)
    hub = HubPush.start(args)
    with ending_workers():
        with lost_contact_errors(Watchdog(), args.dist_timeout):
            state = build_run(args)
        if args.dry_run:
            sys.stdout.write(recipe_text(state.setup.options) if utils.is_primary(args) else '')
            _logger.info('Dry run: options, data and model are valid. Nothing was written.')
        elif args.validate:
            validate_checkpoint(state)
        else:
            fit(state, hub)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-multimix train` or train_timm.py, by default with the arguments sys.argv[1:].

    Returns:
        Exit status: 0 for success, 1 for a run that failed, 2 for a usage error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--timm-script')
    known, rest = parser.parse_known_args(argv)
    if known.timm_script is not None:
        return run_patched([known.timm_script, *rest])
    try:
        return exit_status(lambda: _run(rest))
    finally:
        unlock_folders()
        restore_worker_errors()  # the loaders and their workers have ended
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == '__main__':
    sys.exit(main())
