"""Check option values that are stored in a checkpoint."""
from collections.abc import Mapping
from typing import Any

from ..common.errors import UsageError
from .parser import TrainingParser


def check_recorded(values: Mapping[str, Any], parser: TrainingParser, path: str) -> None:
    """Check the arguments stored in a checkpoint like arguments of the command line. Unknown arguments are skipped.

    Args:
        values: Arguments by name.
        parser: Parser with the options.
        path: Checkpoint or run that is named in the error message.

    Raises:
        UsageError: if an argument has an invalid value.
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise UsageError(f'{path}: the arguments are not a mapping of names to values.')
    try:
        parser.parse_values(values)
    except UsageError as error:
        raise UsageError(f'{path} contains invalid arguments: {error}') from error
