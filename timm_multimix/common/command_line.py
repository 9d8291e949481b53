"""Argument parser with one-line errors and suggestions, commands for hints, and checks of optional packages."""
import argparse
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from .errors import RunError, UsageError, is_dead_worker, near_names, printable, usage_errors

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger(__name__)

# Packages that a type of dataset needs in addition to timm's.
_DATASET_PACKAGES = {
    'hfds': ('datasets',),
    'hfids': ('datasets',),
    'tfds': ('tensorflow', 'tensorflow-datasets'),
    'wds': ('webdataset',),
}
_INVALID_CHOICE = re.compile(r"invalid choice: '?(.*?)'? \(choose from (.*)\)$")
_UNKNOWN = 'unrecognized arguments: '


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UsageError with a suggestion instead of exiting."""

    def error(self, message: str) -> NoReturn:
        message = message.rstrip('.')
        raise UsageError(f'{message}.{self._suggestion(message)}')

    def _suggestion(self, message: str) -> str:
        if message.startswith(_UNKNOWN):
            name = message.removeprefix(_UNKNOWN).split()[0].split('=')[0]
            return near_names(name, dict.fromkeys(re.findall(r'(?<!\S)--?\w[\w-]*(?<!-)', self.format_help())))
        if choice := _INVALID_CHOICE.search(message):
            return near_names(choice[1], [name.strip("' ") for name in choice[2].split(',')])
        return ''


def number(
        kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return a parser of finite numbers of a type from `low` (excluded if `above`) to `high`, for argparse."""
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
    """Run a command, with its log on the terminal and its errors as one log line. Return the exit status.

    It is 2 after a UsageError, 1 after a RunError, 130 after Ctrl-C, and 128 + N if a KeyboardInterrupt has the signal
    number N as its argument.
    """
    from .console import is_first_on_machine, setup_logging  # imports torch, which --help does not need

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
        if error.hint:
            _logger.info(error.hint)
        return 1
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        _logger.error(error)
        return 1
    except KeyboardInterrupt as error:
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    return 0


def _named(path: str) -> str:
    """Return the name of a program if the shell finds the program by its name, otherwise its path."""
    name = os.path.basename(path)
    return name if shutil.which(name) == path or not os.path.isfile(path) else path


def program(subcommand: str = '', processes: int = 1) -> str:
    """Return the shell command that starts a subcommand in the way in which this process was started.

    Examples are `timm-multimix train` and `python train_timm.py`. Several processes are started by torchrun.
    """
    main = sys.modules['__main__']
    module = main.__spec__.name.removesuffix('.__main__') if main.__spec__ else ''
    script = '' if module else getattr(main, '__file__', None) or ''
    name, options = os.path.basename(script), [subcommand] if subcommand else []
    started = 'train' if name == 'train_timm.py' else module.removeprefix('timm_multimix.')  # as in python -m MODULE
    if processes == 1 and name == 'timm-multimix':
        return shlex.join([_named(script), *options])
    words = ['-m', 'timm_multimix', *options]
    if subcommand and subcommand == started:
        words = ['-m', module] if module else [os.path.relpath(script)]
    if processes > 1:
        torchrun = os.path.join(os.path.dirname(sys.executable), 'torchrun')
        return shlex.join([_named(torchrun), '--nproc-per-node', str(processes), *words])
    return shlex.join([_named(sys.executable), *words])


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package.replace('-', '_')) is not None
    except (ImportError, ValueError):  # a blocked or incompletely imported package
        return False


def check_packages(purpose: str, packages: Sequence[str], extra: str | None = None) -> None:
    """Raise UsageError with a pip command if packages that an option or feature needs (`purpose`) are missing.

    `extra` is the extra of timm-multimix that contains them, if there is one.
    """
    if missing := [package for package in packages if not _is_installed(package)]:
        command = f"pip install 'timm-multimix[{extra}]'" if extra else f'pip install {" ".join(missing)}'
        state = 'which is not installed' if len(missing) == 1 else 'which are not installed'
        noun = 'package' if len(missing) == 1 else 'packages'
        raise UsageError(f'{purpose} needs the {noun} {" and ".join(missing)}, {state}: {command}')


def check_dataset_packages(option: str, dataset: str) -> None:
    """Raise UsageError if packages for a type of dataset are missing, given its name TYPE/NAME and option."""
    kind = dataset.partition('/')[0].lower() if '/' in dataset else ''
    check_packages(f'{option} {dataset}', _DATASET_PACKAGES.get(kind, ()))


def open_device(name: str | None) -> 'torch.device':
    """Return the device of the option --device, by default CUDA if it is available, otherwise the CPU."""
    import torch  # slow to import, and not needed for --help

    with usage_errors(f'--device {name}'):
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=device)
    return device


def short_names(specs: Sequence[str]) -> list[str]:
    """Return short, unique names for paths of models, for tables. Raise UsageError if a model is given twice."""
    if len({os.path.normpath(spec) for spec in specs}) < len(specs):
        raise UsageError(f'A model is given twice: {", ".join(specs)}.')
    parts = [os.path.normpath(spec).split(os.sep) for spec in specs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [printable('/'.join(part[-depth:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
