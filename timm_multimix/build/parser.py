"""Parser of `timm-multimix train`."""
import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..common.command_line import Parser, program
from ..common.errors import UsageError, usage_errors
from .arguments import GROUPS
from .option import Group, Option, to_arguments

_NOT_GIVEN = object()


class TrainingParser(Parser):
    """Parser of `timm-multimix train`, with timm's options, --config, --timm-script and other groups of options.

    Attributes:
        options: The options of all groups by destination. Options with the same destination are opposite flags.
    """

    def __init__(self, *groups: Group):
        super().__init__(
            prog=program('train'),
            usage='%(prog)s [--data-dir DIR] [--model MODEL] [--multimix {off,pooled,dense}] [OPTION ...]',
            description="Train an image classifier with timm's models and options, optionally with MultiMix. Without "
                        "--data-dir and --dataset it trains on scikit-learn's digits.",
            epilog='Example: %(prog)s --model resnet50 --multimix dense',
        )
        self.add_argument('-c', '--config', default='', metavar='FILE',
                          help='YAML file of options, or the name of an installed recipe')
        self.add_argument('--timm-script', metavar='FILE',
                          help='run this timm train.py instead, with the MultiMix options added')
        self.options: dict[str, list[Option]] = {}
        for group in (*groups, *GROUPS):
            group.add_to(self)
            for option in group.options:
                self.options.setdefault(option.dest, []).append(option)

    def error(self, message: str) -> NoReturn:
        if message.startswith('unrecognized arguments') and 'token' in message:
            raise UsageError(
                f'{message}. Do not pass a Hub token on the command line: use `hf auth login` or set HF_TOKEN.')
        super().error(message)

    def parse_given(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Parse the command line, and return the values of the given options by destination, without defaults."""
        blank = argparse.Namespace(**dict.fromkeys(('config', 'timm_script', *self.options), _NOT_GIVEN))
        # timm's ParseKwargs does not check its arguments.
        with usage_errors('--model-kwargs, --opt-kwargs and --pretrained-cfg-overlay take arguments KEY=VALUE'):
            values = vars(self.parse_args(argv, blank))
        # argparse sets a missing positional argument to None.
        return {name: value for name, value in values.items() if value is not _NOT_GIVEN and value is not None}

    def parse_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Parse values from a file, by destination, like arguments of the command line. Return them like parse_given.

        Options with the value None and unknown options are skipped.
        """
        given = {name: value for name, value in values.items() if name in self.options and value is not None}
        arguments = [to_arguments(self.options[name], value) for name, value in given.items()]
        arguments.sort(key=lambda words: words[:1] == ['--'])  # a positional argument is last
        parsed = self.parse_given([word for words in arguments for word in words])
        # A flag that is false has no argument.
        return {name: parsed[name] if name in parsed else self.get_default(name) for name in given}
