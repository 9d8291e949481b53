"""Argument parser with one-line errors and suggestions, and checks of optional packages."""
import argparse
import os
import re
from collections.abc import Sequence

import torch

from .advice import DATASET_PACKAGES, missing_packages
from .errors import UsageError, near_names, printable, usage_errors

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
