"""Argument parser with one-line errors and suggestions, and checks of optional packages."""
import argparse
import logging
import math
import os
import re
from collections.abc import Callable, Sequence

import torch

from .advice import DATASET_PACKAGES, missing_packages
from .console import is_first_on_machine, setup_logging
from .errors import RunError, UsageError, near_names, printable, usage_errors

_logger = logging.getLogger(__name__)

_INVALID_CHOICE = re.compile(r"invalid choice: '?(.*?)'? \(choose from (.*)\)$")
_UNKNOWN = 'unrecognized arguments: '


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UsageError with a suggestion instead of exiting."""

    def error(self, message: str):
        message = message.rstrip('.')
        raise UsageError(f'{message}.{self._suggestion(message)}')

    def _suggestion(self, message: str) -> str:
        if message.startswith(_UNKNOWN):
            name = message.removeprefix(_UNKNOWN).split()[0].split('=')[0]
            return near_names(name, re.findall(r'(?<!\S)--?[\w-]+', self.format_help()))
        if choice := _INVALID_CHOICE.search(message):
            return near_names(choice[1], [name.strip("' ") for name in choice[2].split(',')])
        return ''


def number(
        kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return a parser of finite numbers from `low` to `high`, for argparse.

    Args:
        kind: int or float.
        low: Lowest value.
        high: Highest value.
        above: Whether `low` itself is excluded.
    """
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low) or math.isinf(value):
            limit = f'above {low:g}' if above else f'{low:g} or more'
            limit += f' and at most {high:g}' if math.isfinite(high) else ''
            raise argparse.ArgumentTypeError(
                f'must be a {"whole " if kind is int else ""}number, {limit}, got {text!r}')
        return value
    return parse


def exit_status(command: Callable[[], None]) -> int:
    """Run a command, with its log on the terminal and its errors as one log line.

    Args:
        command: The command.

    Returns:
        Exit status: 0; 2 after a UsageError, 1 after a RunError, 130 after Ctrl-C.
    """
    setup_logging()
    logging.getLogger('timm').setLevel(logging.WARNING)
    try:
        command()
    except UsageError as error:
        if is_first_on_machine():  # all processes find the same errors
            _logger.error(error)
        return 2
    except RunError as error:
        if is_first_on_machine() or not error.is_shared:
            _logger.error(error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def check_packages(purpose: str, packages: Sequence[str], extra: str | None = None) -> None:
    """Check that packages are installed; see missing_packages.

    Raises:
        UsageError: if a package is missing.
    """
    message = missing_packages(purpose, packages, extra)
    if message:
        raise UsageError(message)


def check_dataset_packages(option: str, dataset: str) -> None:
    """Check that the packages for a type of dataset are installed.

    Args:
        option: Option of the dataset, for the message.
        dataset: Name of the dataset, TYPE/NAME.

    Raises:
        UsageError: if a package is missing.
    """
    kind = dataset.partition('/')[0].lower() if '/' in dataset else ''
    check_packages(f'{option} {dataset}', DATASET_PACKAGES.get(kind, ()))


def open_device(name: str | None) -> torch.device:
    """Return the device of the option --device, by default CUDA if it is available, otherwise the CPU.

    Raises:
        UsageError: if the device does not exist.
    """
    with usage_errors(f'--device {name}'):
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=device)
    return device


def short_names(specs: Sequence[str]) -> list[str]:
    """Return short, unique names for paths of models, for tables.

    Raises:
        UsageError: if a model is given twice.
    """
    if len({os.path.normpath(spec) for spec in specs}) < len(specs):
        raise UsageError(f'A model is given twice: {", ".join(specs)}.')
    parts = [os.path.normpath(spec).split(os.sep) for spec in specs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [printable('/'.join(part[-depth:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
