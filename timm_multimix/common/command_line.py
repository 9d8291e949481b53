"""Argument parser with one-line errors and suggestions, and checks of optional packages."""
import argparse
import re
from collections.abc import Sequence

from .advice import DATASET_PACKAGES, missing_packages
from .errors import UsageError, near_names

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
            return near_names(name, self._option_string_actions)
        if choice := _INVALID_CHOICE.search(message):
            return near_names(choice[1], [name.strip("' ") for name in choice[2].split(',')])
        return ''


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
