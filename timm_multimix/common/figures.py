"""Figures drawn with matplotlib and returned as PNG."""
import io
import math
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_DPI = 110
# Names may hold any character: $ must not start a formula.
_STYLE = {'text.parse_math': False, 'text.usetex': False, 'font.size': 9, 'legend.fontsize': 8}


def as_png(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """Decorate a function that draws a figure, to return it as PNG."""
    @wraps(draw)
    def render(*args: Any) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Glyph .* missing from')  # shown as a box
            draw(*args).savefig(buffer, format='png', dpi=_DPI)
        return buffer.getvalue()
    return render


def panels(count: int, width: float, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels of a width and a height in inches."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout='constrained')  # no pyplot: it has global state
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]
