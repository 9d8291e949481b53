"""Parser of train_timm.py."""
import argparse
from collections.abc import Callable
from typing import Any

from ..common.command_line import Parser
from ..common.errors import UsageError
from ..common.secrets import redact
from .arguments import CODEGEN, GROUPS, MODEL


class _Parser(Parser):
    """Parser of train_timm.py that removes access tokens from its error messages."""

    def error(self, message: str):
        message = redact(message)
        if message.startswith('unrecognized arguments') and 'token' in message:
            raise UsageError(
                f'{message}. Do not pass a Hub token on the command line: use `hf auth login` or set HF_TOKEN.')
        super().error(message)


def build_parser(add_group: Callable[[argparse.ArgumentParser], Any] | None = None) -> argparse.ArgumentParser:
    """Build the parser of train_timm.py with timm's options. Its errors are UsageErrors.

    Args:
        add_group: Function that adds a further group of options, such as add_multimix_args.
    """
    parser = _Parser(
        prog='train_timm.py',
        usage='train_timm.py [--data-dir DIR] [--model MODEL] [--multimix {off,pooled,dense}] [OPTION ...]',
        description="Train an image classifier with timm's models and options, optionally with MultiMix. Without "
                    "--data-dir and --dataset it trains on scikit-learn's digits.",
        epilog='Example: train_timm.py --model resnet50 --multimix dense',
    )
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with values for these options')
    parser.add_argument('--timm-script', metavar='FILE',
                        help='run this timm train.py instead, with the MultiMix options added')
    parser.add_argument('data', nargs='?', metavar='DIR', help='deprecated, use --data-dir')
    if add_group is not None:
        add_group(parser)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            group.add_argument(*option.names, **option.settings)
        if options is MODEL:
            exclusive = group.add_mutually_exclusive_group()
            for option in CODEGEN:
                exclusive.add_argument(*option.names, **option.settings)
    return parser
