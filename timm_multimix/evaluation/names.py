"""Names of runs and datasets for figures, tables and pages, where any character of a file name may occur."""
from collections.abc import Sequence

from ..common.errors import printable

_ELLIPSIS = '\N{HORIZONTAL ELLIPSIS}'


def shorten(text: str, length: int) -> str:
    """Replace the middle of a text by an ellipsis if it is longer than length characters."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return text[:length - 1 - end] + _ELLIPSIS + text[len(text) - end:]


def short_names(names: Sequence[str], length: int) -> list[str]:
    """Shorten names to length characters. Names that would become equal are numbered."""
    short = [shorten(printable(name), length) for name in names]
    if len(set(short)) < len(short):
        short = [f'{k}: {shorten(printable(name), length - 4)}' for k, name in enumerate(names, 1)]
    return short
