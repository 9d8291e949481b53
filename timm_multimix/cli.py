"""The command `timm-multimix`. The modules of its subcommands are imported when they run."""
import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .common.command_line import Parser, program
from .common.errors import UsageError
from .version import __version__

# For each subcommand: the module with its main function, a line of help, and the arguments of an example.
_COMMANDS = {
    'train': ('training.main', "train an image classifier with timm's options and MultiMix", '--multimix dense'),
    'evaluate': ('evaluation.main', 'compare the accuracy, calibration and robustness of trained models',
                 'output/train/RUN'),
    'detect': ('detection.main', 'compare backbones by the object detectors that are trained on them',
               'output/train/RUN resnet18'),
    'calibrate': ('calibration.command', 'fit a temperature for the best checkpoint of a run', 'output/train/RUN'),
    'hub': ('hub.command', 'push a run to the Hugging Face Hub, export it, or print its model card',
            'push output/train/RUN user/name'),
    'patch': ('patch', "run timm's own train.py with the MultiMix options", 'path/to/train.py --multimix dense'),
    'recipes': ('common.recipes', 'list and show the recipes for --config of train', 'list'),
}


def _build_parser() -> Parser:
    width = max(map(len, _COMMANDS))
    lines = [f'  {name:{width}}  {text}' for name, (_, text, _) in _COMMANDS.items()]
    examples = [f'  %(prog)s {name} {arguments}' for name, (_, _, arguments) in _COMMANDS.items()]
    parser = Parser(
        prog=program(), usage='%(prog)s COMMAND [ARGUMENT ...]', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='\n'.join([
            'MultiMix for timm: train image classifiers on interpolations of all images of a mini-batch.', '',
            'commands:', *lines]),
        epilog='\n'.join([
            'examples:', *examples, '',
            'Without a dataset, train uses the digits of scikit-learn. The option --help of a command describes its '
            'arguments.']))
    parser.add_argument('command', metavar='COMMAND', choices=_COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument('--version', action='version', version=f'timm-multimix {__version__}')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `timm-multimix`, by default with the arguments sys.argv[1:].

    Returns:
        Exit status of the subcommand; 2 for a usage error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in _COMMANDS:
            return import_module(f'.{_COMMANDS[argv[0]][0]}', __package__).main(argv[1:])
        parser = _build_parser()
        if argv:
            parser.parse_args(argv)
        parser.print_help(sys.stderr)
    except UsageError as error:
        print(f'ERROR: {error}', file=sys.stderr)
    except KeyboardInterrupt:  # while the modules of the command are imported
        return 130
    return 2
