"""Tables of command-line options, and conversion of values in files to arguments of the command line."""
import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm.utils import ParseKwargs

from ..common.errors import UsageError

_FLAGS = {'store_true': True, 'store_false': False}


def option_name(dest: str) -> str:
    """Return the name of an option on the command line, '--batch-size' for 'batch_size'."""
    return '--' + dest.replace('_', '-')


class Option(NamedTuple):
    """Names of an option and the keyword arguments of its `add_argument` call."""
    names: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The first long name, or the name of a positional argument."""
        return next((name for name in self.names if name.startswith('--')), self.names[0])

    @property
    def dest(self) -> str:
        """Attribute name in the parsed arguments."""
        return self.settings.get('dest') or self.name.removeprefix('--').replace('-', '_')


class Group(NamedTuple):
    """Argument group."""
    title: str
    options: Sequence[Option]
    description: str | None = None

    def add_to(self, parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
        """Add the group to a parser."""
        group = parser.add_argument_group(self.title, self.description)
        for option in self.options:
            group.add_argument(*option.names, **option.settings)
        return group


def value(*names: str, type: Any = str, default: Any = None, help: str, **settings: Any) -> Option:
    """Create an option with a value. The default is added to the help text."""
    suffix = '' if default in (None, '', []) else f' (default: {_format_default(default)})'
    return Option(names, dict(type=type, default=default, help=(help + suffix).replace('%', '%%'), **settings))


def flag(name: str, help: str) -> Option:
    return Option((name,), dict(action='store_true', default=False, help=help.replace('%', '%%')))


def pairs(name: str, help: str) -> Option:
    return Option((name,), dict(nargs='*', action=ParseKwargs, default={}, metavar='KEY=VALUE', help=help))


def _format_default(default: Any) -> str:
    return ' '.join(f'{number:.4g}' for number in default) if isinstance(default, list) else str(default)


def to_arguments(options: Sequence[Option], given: Any) -> list[str]:
    """Convert a value in a file to arguments of the command line. The parser checks the arguments.

    Args:
        options: The options with the same destination: one option, or a flag and the opposite flag.
        given: The value, not None.

    Raises:
        UsageError: if the type of the value does not match the option.
    """
    name, settings = options[0].name, options[0].settings
    action, nargs = settings.get('action'), settings.get('nargs')
    if action in _FLAGS:
        if not isinstance(given, bool):
            raise UsageError(f'{name} must be true or false, got {given!r}.')
        return [option.name for option in options if _FLAGS[option.settings['action']] is given]
    if action is ParseKwargs:
        if not isinstance(given, Mapping):
            raise UsageError(f'{name} must be a mapping, got {given!r}.')
        return [name, *(f'{key}={item!r}' for key, item in given.items())]
    if isinstance(given, bool) and nargs == '?' and name.startswith('--'):
        return [name] if given else []
    if given is False and 'off' in settings.get('choices', ()):
        given = 'off'  # YAML reads a bare off as False
    is_list, is_number = nargs not in (None, '?'), settings['type'] is not str
    items = given if is_list and isinstance(given, (list, tuple)) else [given]
    texts = [str(item) for item in items]
    # argparse takes a string that starts with - for an option.
    is_ambiguous = is_list and not is_number and any(text.startswith('-') for text in texts)
    if is_ambiguous or any(isinstance(item, (bool, list, tuple, Mapping)) for item in items):
        raise UsageError(f'{name} has an invalid value: {given!r}.')
    if not name.startswith('--'):
        return ['--', *texts]
    if not is_list:
        return [f'{name}={texts[0]}']
    if not texts and not settings['default']:
        return []
    return [name, *(f' {text}' if text.startswith('-') else text for text in texts)]  # also -1e-05
