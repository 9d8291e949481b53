"""Markdown formatting and escaping of external text such as class names."""
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_JOINERS = '\u200c\u200d'  # required in words of some languages and in emoji
_SPECIAL = re.compile(r'[\\`*\[\]~$|]|(?<!\w)_|_(?!\w)')
_ADDRESS = re.compile(r'\b(?:https?|ftp)(?=:)|\bwww(?=\.)', re.IGNORECASE)  # Markdown turns these into links
_ENTITIES = str.maketrans({'&': '&amp;', '<': '&lt;', '>': '&gt;'})


def one_line(value: Any) -> str:
    """Convert a value to one line of printable characters."""
    characters = []
    for character in str(value):
        kind = unicodedata.category(character)
        if kind in ('Cc', 'Zl', 'Zp'):
            character = ' '
        elif kind == 'Cs':  # from a file name that is not UTF-8
            character = '\N{REPLACEMENT CHARACTER}'
        elif kind == 'Cf' and character not in _JOINERS:  # invisible, or changes the direction of the text
            character = ''
        characters.append(character)
    return ' '.join(''.join(characters).split())


def escape(value: Any) -> str:
    """Escape a value so that Markdown and HTML display it literally."""
    text = one_line(value)
    text = _SPECIAL.sub(r'\\\g<0>', text).translate(_ENTITIES)
    return _ADDRESS.sub(r'\g<0>&#8203;', text)


def code(value: Any) -> str:
    """Format a value as a code span that is also valid in a table cell."""
    text = one_line(value).replace('|', '\\|')
    fence = '`' * (1 + max((len(run) for run in re.findall('`+', text)), default=0))
    return f'{fence}{text}{fence}' if '`' not in text else f'{fence} {text} {fence}'


def code_block(text: str, language: str) -> str:
    """Format text as a fenced code block."""
    fence = '`' * max(3, 1 + max((len(run) for run in re.findall('`+', text)), default=0))
    return f'{fence}{language}\n{text}\n{fence}'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table. The cells are Markdown and are not escaped."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
