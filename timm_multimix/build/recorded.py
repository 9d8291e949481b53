"""Check option values that come from a YAML file or a checkpoint."""
import argparse
from collections.abc import Mapping
from typing import Any

from timm.utils import ParseKwargs

from ..common.errors import UsageError, near_names


def _scalar(action: argparse.Action, value: Any) -> Any:
    """Convert one YAML value like argparse. Numbers can be strings, because YAML parses 3e-4 as a string."""
    if value is False and action.choices and 'off' in action.choices:
        return 'off'  # YAML parses a bare off as False
    convert = action.type or str
    if isinstance(value, (bool, list, dict)) or (convert is int and isinstance(value, float)):
        raise ValueError
    value = convert(value)
    if action.choices and value not in action.choices:
        raise ValueError
    return value


def _expected(action: argparse.Action) -> str:
    if isinstance(action, argparse._StoreTrueAction):
        return 'true or false'
    if isinstance(action, ParseKwargs):
        return 'a mapping'
    kind = {int: 'integer', float: 'number'}.get(action.type, 'string')
    kind = f'one of {", ".join(action.choices)}' if action.choices else kind
    if isinstance(action.nargs, int) or action.nargs in ('+', '*'):
        return f'a list of {action.nargs if isinstance(action.nargs, int) else ""} {kind}s'.replace('  ', ' ')
    return kind


def option_value(action: argparse.Action, value: Any) -> Any:
    try:
        if isinstance(action, (argparse._StoreTrueAction, ParseKwargs)):
            if not isinstance(value, bool if action.nargs == 0 else dict):
                raise ValueError
            return value
        if isinstance(action.nargs, int) or action.nargs in ('+', '*'):
            if isinstance(action.nargs, str) and not isinstance(value, list):
                value = [value]  # a single value, as on the command line
            if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
                raise ValueError
            return [_scalar(action, item) for item in value]
        return _scalar(action, value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f'{action.dest}: {error}') from error
    except (ValueError, TypeError) as error:
        hint = near_names(value, action.choices) if action.choices and isinstance(value, str) else ''
        raise UsageError(f'{action.dest} must be {_expected(action)}, got {value!r}.{hint}') from error


def check_recorded(values: Mapping[str, Any], parser: argparse.ArgumentParser, path: str) -> None:
    """Check the arguments stored in a checkpoint like the options of a YAML file. Unknown arguments are skipped.

    Args:
        values: Arguments by name.
        parser: Parser with the options.
        path: Checkpoint or run that is named in the error message.

    Raises:
        UsageError: if an argument has an invalid value.
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise UsageError(f'{path}: the arguments are not a mapping of names to values.')
    for dest, action in {action.dest: action for action in parser._actions}.items():
        if values.get(dest) is not None:
            try:
                option_value(action, values[dest])
            except UsageError as error:
                raise UsageError(f'{path} contains invalid arguments: {error}') from error
