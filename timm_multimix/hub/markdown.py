"""Text from elsewhere, such as class names, in a Markdown document."""
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_JOINERS = '\u200c\u200d'  # a part of words of some languages, and of emoji
_SPECIAL = re.compile(r'[\\`*\[\]~$|]|(?<!\w)_|_(?!\w)')
_ADDRESS = re.compile(r'\b(?:https?|ftp)(?=:)|\bwww(?=\.)', re.IGNORECASE)  # Markdown makes links of them
_ENTITIES = str.maketrans({'&': '&amp;', '<': '&lt;', '>': '&gt;'})


def one_line(value: Any) -> str:
    """A value as one line of printable characters."""
    characters = []
    for character in str(value):
        kind = unicodedata.category(character)
        if kind in ('Cc', 'Zl', 'Zp'):
            character = ' '
        elif kind == 'Cs':  # of a file name that is not UTF-8
            character = '\N{REPLACEMENT CHARACTER}'
        elif kind == 'Cf' and character not in _JOINERS:  # changes the direction of the text, or is not visible
            character = ''
        characters.append(character)
    return ' '.join(''.join(characters).split())


def escape(value: Any) -> str:
    """A value as text that Markdown and HTML show as it is."""
    text = one_line(value)
    text = _SPECIAL.sub(r'\\\g<0>', text).translate(_ENTITIES)
    return _ADDRESS.sub(r'\g<0>&#8203;', text)


def code(value: Any) -> str:
    """A value as a code span, in a table too."""
    text = one_line(value).replace('|', '\\|')
    fence = '`' * (1 + max((len(run) for run in re.findall('`+', text)), default=0))
    return f'{fence}{text}{fence}' if '`' not in text else f'{fence} {text} {fence}'


def code_block(text: str, language: str) -> str:
    """Lines of code."""
    fence = '`' * max(3, 1 + max((len(run) for run in re.findall('`+', text)), default=0))
    return f'{fence}{language}\n{text}\n{fence}'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
