"""Command line of `timm-multimix evaluate`."""
import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..build.saved_weights import CALIBRATED
from ..calibration.run import check_trusted, share_split
from ..common.command_line import Parser, check_packages, exit_status, number, open_device, program
from ..common.errors import UsageError
from ..common.files import check_output
from ..common.results import default_folder, print_text, write_file, write_results
from ..data.demo import DEMO_PREFIX
from .images import Source, parse_source
from .models import Candidate, load_candidates
from .ood import NOISES
from .report import render_html, render_table
from .robustness import ATTACK_LOSSES, PIXEL_LEVELS
from .suite import PARTS, evaluate_models

_logger = logging.getLogger(__name__)

_EPILOG = """\
examples:
  %(prog)s output/train/run
      a run, on its validation images
  %(prog)s output/train/ce output/train/dense --ood demo/letters uniform gaussian
      compare two runs
  %(prog)s hf-hub:timm/resnet50.a1_in1k --data-dir imagenet --parts attacks --eps 1/255 4/255
      a model of the Hub, with attacks only
"""


def _epsilon(text: str) -> float:
    """Parse the size of an attack: '8' for 8 of the 255 levels of a pixel, '8/255' for a fraction of the range."""
    numerator, slash, denominator = text.partition('/')
    try:
        value = float(numerator) / (float(denominator) if slash else PIXEL_LEVELS)
    except (ValueError, ZeroDivisionError):
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f'must be a number of levels from 0 to {PIXEL_LEVELS} or a fraction, such as 8/255, got {text!r}')
    if not slash and 0 < float(numerator) < 0.1:  # probably meant as a fraction
        raise argparse.ArgumentTypeError(
            f'{text} of {PIXEL_LEVELS} levels changes nothing. Write it as a fraction, such as 8/255')
    return value


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `timm-multimix evaluate`."""
    parser = Parser(
        prog=program('evaluate'), epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Evaluate image classifiers: accuracy, calibration, selective classification, robustness to '
                    'attacks and corruptions, out-of-distribution detection, and the geometry of the embeddings. '
                    'Several models are compared.')
    parser.add_argument(
        'models', nargs='+', metavar='MODEL',
        help="run folder (its calibrated checkpoint if there is one, otherwise its best), checkpoint, "
             "'hf-hub:user/name', or name of a timm model")
    _add_data_options(parser)
    _add_part_options(parser)
    add = parser.add_argument_group('execution').add_argument
    add('-b', '--batch-size', type=number(int, 1), metavar='N',
        help='images per batch (default: 256 on a GPU, 32 on the CPU); halved if memory does not suffice')
    add('-j', '--workers', type=number(int, 0), metavar='N',
        help='number of processes that load images (default: as in the first run, or 4)')
    add('--device', metavar='DEVICE', help='device (default: cuda if available, otherwise cpu)')
    add('--seed', type=number(int, 0), default=0, metavar='N',
        help='seed of samples, random starts and noise (default: 0)')
    add('--output', metavar='DIR', help='folder for results.json and report.html (default: output/evaluate/TIME)')
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('images').add_argument
    add('--data-dir', metavar='DIR', help='folder of images or of the dataset (default: --data-dir of the first run)')
    add('--dataset', metavar='NAME', default='', help='dataset, as for training (default: --dataset of the first run)')
    add('--split', metavar='NAME',
        help='split to evaluate on (default: the validation split of the first run, or validation)')
    add('--class-map', metavar='FILE', help='file that maps class names to indices')
    add('--input-key', metavar='KEY', help='field of a sample that contains the image')
    add('--target-key', metavar='KEY', help='field of a sample that contains the target')
    add('--dataset-download', dest='download', action='store_true', help='download the dataset if it is missing')
    add('--max-images', type=number(int, 1), metavar='N', help='evaluate on at most N images, drawn at random')
    add('--sample', type=number(int, 1), default=2000, metavar='N',
        help='number of images for measurements that take many passes: attacks, corruptions, embeddings, mixed images '
             '(default: 2000)')
    add('--calibration-split', metavar='NAME',
        help='split to fit a temperature on (default: cross-fitting, where each half of the evaluated images gets the '
             'temperature fitted on the other half)')


def _add_part_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('measurements').add_argument
    add('--parts', nargs='*', default=list(PARTS), choices=PARTS, metavar='PART',
        help=f'measurements beyond accuracy and calibration: {", ".join(PARTS)} (default: all)')
    add('--eps', nargs='+', type=_epsilon, default=[levels / PIXEL_LEVELS for levels in (1, 2, 4, 8)], metavar='EPS',
        help='sizes of the attacks: levels of a pixel, of 255, or fractions such as 8/255 (default: 1 2 4 8)')
    add('--pgd-steps', type=number(int, 1), default=10, metavar='N', help='steps of PGD (default: 10)')
    add('--pgd-step', type=_epsilon, metavar='SIZE',
        help='size of a step of PGD, in the same units (default: 2.5 EPS / N)')
    add('--attack-loss', choices=ATTACK_LOSSES, default='log-odds',
        help='loss that the attacks maximize: log-odds against the true class, whose gradient does not vanish for '
             'confident predictions, or cross-entropy, as in published results (default: log-odds)')
    add('--ood', nargs='*', default=list(NOISES), metavar='DATA',
        help="out-of-distribution images: folders, datasets (NAME=FOLDER for a dataset in a folder), 'uniform' and "
             "'gaussian' noise; DATA@SPLIT for another split than validation (default: both noises)")


def _source(args: argparse.Namespace, run: argparse.Namespace | None) -> Source:
    """Return the images of the options, by default the validation images of the first run."""
    options, inherited = (
        {name: value for name in ('class_map', 'input_key', 'target_key', 'download')
         if (value := getattr(given, name, None))} for given in (args, run))
    if args.data_dir or args.dataset:
        return Source(args.dataset, args.data_dir, args.split or 'validation', options)
    if run is None or not (run.data_dir or run.dataset):
        raise UsageError('No images to evaluate on. Add --data-dir FOLDER, or --dataset NAME such as demo/digits.')
    split = args.split or run.val_split
    if not split:
        raise UsageError('The first run has no validation split. Add --split.')
    check_trusted(run, [split, args.calibration_split or ''])
    source = Source(run.dataset, run.data_dir, split, {**inherited, **options})
    _logger.info(f'Evaluating on {source}, the validation images of the first run.')
    return source


def _complete(args: argparse.Namespace, candidates: Sequence[Candidate], device: torch.device) -> None:
    """Set the sources of images, and options whose defaults depend on the first run and the device."""
    runs = {candidate.name: candidate.args for candidate in candidates if candidate.args is not None}
    run = next(iter(runs.values()), None)
    args.source, args.calibration = _source(args, run), None
    if args.calibration_split:
        args.calibration = replace(args.source, split=args.calibration_split)
        if trained := [name for name in runs if share_split(runs[name].train_split, args.calibration_split)]:
            _logger.warning(
                f'--calibration-split {args.calibration_split}: {", ".join(trained)} may have been trained on these '
                'images and be more confident on them than on other images. Choose another split, or leave out the '
                'option.')
    args.outside = [
        name if name in NOISES else parse_source(name, 'validation', args.download) for name in args.ood]
    if args.workers is None:
        is_demo = args.source.dataset.lower().startswith(DEMO_PREFIX)
        args.workers = 0 if is_demo else min(run.workers if run else 4, os.cpu_count() or 1)
    args.batch_size = args.batch_size or (256 if device.type == 'cuda' else 32)
    args.eps = sorted(set(args.eps))


def _run(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    check_packages('Evaluation', ['torchmetrics', *(['captum'] if 'attacks' in args.parts else [])], extra='eval')
    device = open_device(args.device)
    folder = args.output or default_folder('evaluate')
    check_output(folder)
    candidates = load_candidates(args.models)
    _complete(args, candidates, device)
    calibrated = [candidate.name for candidate in candidates if candidate.weights == CALIBRATED]
    if 0 < len(calibrated) < len(candidates):
        _logger.warning(
            f'{", ".join(calibrated)}: calibrated, but the other models are not. Compare the rows "at temperature".')
    results = []
    for result in evaluate_models(candidates, args, device):
        results.append(result)
        write_results(  # after each model, because the next one may fail
            folder, source=str(args.source), max_images=args.max_images, sample=args.sample, seed=args.seed,
            models={result.name: result.values for result in results})
    print_text(render_table(results))
    _logger.info(f'Report: {write_file(folder, "report.html", render_html(results, str(args.source), args.seed))}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-multimix evaluate` and return its exit status, see exit_status."""
    return exit_status(lambda: _run(argv))


if __name__ == '__main__':
    sys.exit(main())
