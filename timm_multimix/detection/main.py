"""Command line of `timm-multimix detect`."""
import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from urllib.parse import quote

import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import nn

from ..common.command_line import Parser, check_packages, exit_status, number, open_device, program
from ..common.distributed import choose_device, join_processes, of_the_first
from ..common.errors import UsageError, usage_errors
from ..common.files import check_output, unlock_folders
from ..common.results import default_folder, print_text, write_file
from ..evaluation.models import load_candidates
from .datasets import DetectionDataset
from .detectors import DETECTORS, Settings, create_detector
from .metric import mean_average_precision
from .report import Comparison, predictions_figure
from .splits import SCENES, image_bounds, load_splits
from .training import transfer

_logger = logging.getLogger(__name__)

_TIMEOUT = 1800  # seconds that processes wait for each other

_EPILOG = f"""\
data:
  {SCENES}                       embedded scenes of 96 pixels with digits, figures and letters
  coco:IMAGES:ANNOTATIONS.json      folder of images and COCO file; one for --data, one for --test-data
  voc:ROOT[:YEAR]                   folder that contains VOCdevkit; trainval and test of 2007, otherwise train and val;
                                    2007+2012 trains on both years and tests on 2007

examples:
  %(prog)s output/train/digits resnet18
      compare a trained backbone with random weights, both frozen, on the embedded scenes
  %(prog)s output/train/ce output/train/dense --seeds 5
  %(prog)s hf-hub:timm/resnet50.a1_in1k --detector fasterrcnn \\
      --data coco:train2017:instances_train2017.json --test-data coco:val2017:instances_val2017.json
  torchrun --nproc-per-node 8 -m timm_multimix detect RUN --data voc:data:2007+2012
"""

# Defaults for the embedded scenes, and for other data.
_FOR_SCENES = dict(frozen=True, epochs=6, batch_size=8, lr=3e-3, fpn_channels=64, head_convs=1, hflip=0.0, workers=0)
_FOR_OTHERS = dict(frozen=False, epochs=12, batch_size=8, lr=1e-4, fpn_channels=256, head_convs=4, hflip=0.5, workers=4)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `timm-multimix detect`."""
    def default(name: str) -> str:
        return f'(default: {_FOR_SCENES[name]:g} on {SCENES}, {_FOR_OTHERS[name]:g} on other data)'

    parser = Parser(
        prog=program('detect'), epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Train object detectors on the backbones of trained models, and compare their mean average '
                    'precision.')
    add = parser.add_argument
    add('models', nargs='+', metavar='RUN',
        help="run folder, checkpoint, 'hf-hub:user/name', or a model name of timm (random weights, or --pretrained)")
    add('--pretrained', action='store_true', help="load timm's pretrained weights for model names of timm")
    data = parser.add_argument_group('data').add_argument
    data('--data', default=SCENES, metavar='DATA', help='training data, see below (default: %(default)s)')
    data('--test-data', metavar='DATA', help='test data (default: the test split of --data)')
    data('--num-train', type=number(int, 1), metavar='N', help='number of scenes (default: 800), or maximum of images')
    data('--num-test', type=number(int, 1), metavar='N', help='the same for the test data (default: 300 scenes)')
    data('--min-size', type=number(int, 16), metavar='N',
         help='shorter side that images are resized to (default: the median of the training images)')
    data('--max-size', type=number(int, 16), metavar='N',
         help='maximum of the longer side (default: 1333/800 of the shorter side)')
    how = parser.add_argument_group('training').add_argument
    how('--detector', default='fcos', choices=list(DETECTORS), help='detector of torchvision (default: %(default)s)')
    backbone = parser.add_mutually_exclusive_group()
    backbone.add_argument('--frozen', action='store_true', default=None,
                          help=f'do not train the backbone (default on {SCENES})')
    backbone.add_argument('--finetune', dest='frozen', action='store_false',
                          help='train the backbone (default on other data)')
    how('--epochs', type=number(int, 1), metavar='N', help='number of epochs ' + default('epochs'))
    how('-b', '--batch-size', type=number(int, 1), metavar='N', help='images per process ' + default('batch_size'))
    how('--lr', type=number(float, 0, above=True), help='maximum learning rate ' + default('lr'))
    how('--opt', default='adamw', metavar='NAME', help='optimizer of timm (default: %(default)s)')
    how('--weight-decay', type=number(float, 0), default=0.05, metavar='W', help='weight decay (default: %(default)s)')
    how('--fpn-channels', type=number(int, 32), metavar='N',
        help='channels of the feature pyramid, a multiple of 32 ' + default('fpn_channels'))
    how('--head-convs', type=number(int, 0), metavar='N',
        help='convolutions in the head of FCOS before the last one ' + default('head_convs'))
    how('--hflip', type=number(float, 0, high=1), metavar='P',
        help='probability of a horizontal flip ' + default('hflip'))
    how('--amp', action='store_true', help='train with bfloat16 autocast')
    how('--device', metavar='DEVICE', help='device (default: cuda if available, otherwise cpu)')
    how('-j', '--workers', type=number(int, 0), metavar='N', help='processes that read images ' + default('workers'))
    how('--seed', type=number(int, 0), default=0, metavar='N', help='first seed (default: %(default)s)')
    how('--seeds', type=number(int, 1), default=1, metavar='N', help='number of seeds (default: %(default)s)')
    add('--output', metavar='DIR',
        help='folder for results.json and figures (default: output/detection/TIME). Finished rows in it are kept, so '
             'that the same command continues, and further backbones and seeds can be added')
    return parser


def _settings(args: argparse.Namespace, train: DetectionDataset) -> Settings:
    """Return the settings, with defaults for the data. Set args.workers as well."""
    for name, value in (_FOR_SCENES if args.data == SCENES else _FOR_OTHERS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.fpn_channels % 32:
        raise UsageError(f'--fpn-channels {args.fpn_channels}: must be a multiple of 32.')
    args.min_size, max_size = image_bounds(train, args.min_size)
    args.max_size = args.max_size or max_size
    if args.max_size < args.min_size:
        raise UsageError(f'--max-size {args.max_size} is less than the shorter side, {args.min_size} (--min-size).')
    with usage_errors(f'--opt {args.opt}'):
        create_optimizer_v2(nn.Linear(1, 1), opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    return Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})


def _run(args: argparse.Namespace) -> None:
    check_packages('Detection', ['torchmetrics', 'faster-coco-eval'], extra='detect')
    args.device = str(open_device(args.device))
    device = choose_device(args)
    check_output(args.output)
    train, test = datasets = load_splits(args.data, args.test_data, args.num_train, args.num_test)
    settings = _settings(args, train)
    data = dict(train=train.name, test=test.name, num_train=len(train), num_test=len(test))
    conditions = dict(data=data, settings=dict(asdict(settings), processes=args.world_size))
    sources = load_candidates(args.models, args.pretrained)
    for source in sources:
        create_detector(source, len(train.classes), settings)  # raises an error if the backbone cannot be used
    rows = [(seed, index) for seed in range(args.seed, args.seed + args.seeds) for index in range(len(sources))]
    if args.rank == 0:
        comparison = Comparison(args.output, conditions, sources)
        missing = [(seed, index) for seed, index in rows if not comparison.has(sources[index], seed)]
        if len(missing) < len(rows):
            _logger.info(f'{args.output} already contains {len(rows) - len(missing)} of {len(rows)} rows.')
        rows = missing
    _logger.info(f'Training on {train.name}, {len(train)} images; testing on {test.name}, {len(test)} images. '
                 f'Results in {args.output}.')
    if args.distributed:
        join_processes(device, args.rank, args.world_size, _TIMEOUT)
        rows = of_the_first(rows)
    for seed, index in rows:
        started = time.perf_counter()
        [(predictions, targets)] = transfer(
            sources[index], datasets, settings, device, seed=seed, workers=args.workers)
        if args.rank == 0:
            row = mean_average_precision(predictions, targets)
            row['seconds'] = round(time.perf_counter() - started, 1)
            comparison.add(sources[index], seed, row)
            name = sources[index].name
            _logger.info(f'{name}, seed {seed}: mAP {row["mAP"]:.3f}, mAP50 {row["mAP50"]:.3f} '
                         f'({row["seconds"]:.0f} s)')
            if seed == args.seed:
                write_file(args.output, f'predictions-{quote(name, safe="")}.png',
                           predictions_figure(name, test, predictions, targets))
    if args.rank == 0:
        print_text(comparison.table())


def _command(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    args.output = args.output or default_folder('detection')
    try:
        _run(args)
    except KeyboardInterrupt:
        _logger.warning(f'Interrupted. Finished rows are kept: the same command with --output {args.output} continues.')
        raise
    finally:
        unlock_folders()
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-multimix detect` and return its exit status, see exit_status."""
    return exit_status(lambda: _command(argv))
