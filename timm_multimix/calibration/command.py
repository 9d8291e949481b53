"""The command `timm-multimix calibrate`: fit a temperature for the best checkpoint of a finished run."""
import argparse
import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext, suppress

from torch.utils.data import Dataset

from ..build.checkpoint import read_checkpoint
from ..build.classes import match_classes
from ..build.datasets import build_datasets
from ..build.loaders import build_calibration_loader
from ..build.model import create_run_model, input_channels, model_options, place_model, resolve_data
from ..build.recorded import recorded_arguments
from ..common.command_line import Parser, exit_status, number, open_device, program
from ..common.errors import RunError, UsageError, usage_errors
from ..common.files import lock_folder, unlock_folders
from ..data.class_names import valid_classes
from ..data.dataset_types import code_danger
from ..options import build_training_parser
from .run import calibration_share, check_trusted, hold_out, share_split, write_calibrated

_logger = logging.getLogger(__name__)


def _build_parser() -> Parser:
    parser = Parser(
        prog=program('calibrate'),
        description='Fit a temperature for the best checkpoint of a run, on images that it was not trained on, and '
                    'write model_calibrated.pth.tar to the run folder: the same predictions with calibrated '
                    'probabilities.',
        epilog='Example: %(prog)s output/train/RUN --split test')
    add = parser.add_argument
    add('run', metavar='RUN', help='run folder with model_best.pth.tar')
    add('--split', metavar='NAME',
        help='split of the images (default: the images that the run held out with --calibrate, or its validation '
             'split; validation for other data)')
    add('--data-dir', metavar='DIR', help='folder of other images (default: the data of the run)')
    add('--dataset', metavar='NAME', help='another dataset, as for training')
    add('-b', '--batch-size', type=number(int, 1), metavar='N', help='images per batch (default: as in the run)')
    add('-j', '--workers', type=number(int, 0), metavar='N', help='data loading processes (default: as in the run)')
    add('--device', metavar='DEVICE', help='default: cuda if available, otherwise cpu')
    return parser


def _uses_data_of_run(args: argparse.Namespace) -> bool:
    return args.data_dir is None and args.dataset is None


def _open_images(args: argparse.Namespace, run: argparse.Namespace, in_chans: int) -> Dataset:
    """Open the images to fit a temperature on. Set the data options of the run to them, and run.calibrate to a split.

    A share of the training images, the value of --calibrate, is held out again.
    """
    if args.split and calibration_share(args.split) is not None:
        raise UsageError(f'--split {args.split}: must be the name of a split. `train --calibrate` holds out a share.')
    is_own = _uses_data_of_run(args)
    calibrate = args.split or ((run.calibrate or run.val_split) if is_own else 'validation')
    if not calibrate:
        raise UsageError('The run has no validation split: give --split or --data-dir.')
    if is_own:
        check_trusted(run, [run.train_split, calibrate])
    train = None
    if not code_danger(run.dataset, run.data_dir, [run.train_split]):
        with nullcontext() if is_own else suppress(UsageError):  # they may be on another machine
            train, _ = build_datasets(argparse.Namespace(**{**vars(run), 'val_split': ''}), in_chans)
    if not is_own:
        run.dataset, run.data_dir = args.dataset or '', args.data_dir
    run.calibrate = calibrate
    _, images = hold_out(run, train, None, in_chans)
    assert images is not None
    return images


def _calibrate(args: argparse.Namespace) -> None:
    best = os.path.join(args.run, 'model_best.pth.tar')
    if not os.path.isfile(best):
        raise UsageError(f'{args.run} is not the folder of a finished run: it does not contain model_best.pth.tar.')
    checkpoint = read_checkpoint(best)
    run = recorded_arguments(checkpoint, best, build_training_parser())
    if run.naflex_loader:
        raise UsageError(f'{best} was trained with --naflex-loader, which calibration does not support.')
    if run.task != 'classification' or run.num_classes is None:
        raise UsageError(f'{best}: only models with one class for each image, and a known number of classes, can be '
                         'calibrated.')
    with usage_errors(args.run):
        lock_folder(args.run, 'run folder')
    vars(run).update(  # a checkpoint never decides to run code or to download
        distributed=False, dataset_trust_remote_code=False, dataset_download=False,
        device=str(open_device(args.device)),
        batch_size=args.batch_size or run.validation_batch_size or run.batch_size, validation_batch_size=None,
        workers=min(run.workers, os.cpu_count() or 1) if args.workers is None else args.workers)
    options = model_options(run)
    images = _open_images(args, run, input_channels(options))
    has_selected = bool(
        _uses_data_of_run(args) and run.val_split and share_split(run.val_split, run.calibrate))
    if has_selected:
        _logger.warning(
            f'The split {run.calibrate} has selected the best checkpoint. Evaluate the calibrated model on other '
            'images.')
    if classes := valid_classes(checkpoint.get('class_to_idx')):
        match_classes(run, images, run.calibrate, classes, best)
    model = place_model(run, create_run_model(run, options))
    loader = build_calibration_loader(run, images, resolve_data(run, model))
    with usage_errors(best):
        path = write_calibrated(args.run, model, loader, nullcontext)
    if path is None:
        raise RunError('No calibrated checkpoint was written.')
    _logger.info(
        f'Evaluate it with\n  {program("evaluate")} {shlex.quote(args.run)}{" --split SPLIT" if has_selected else ""}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-multimix calibrate` and return its exit status, see exit_status."""
    try:
        return exit_status(lambda: _calibrate(_build_parser().parse_args(argv)))
    finally:
        unlock_folders()
