"""Figures of the report, drawn with matplotlib and returned as PNG."""
import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import wraps

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from .names import short_names
from .suite import Result

_WIDTH, _HEIGHT = 3.6, 3.2  # of one panel, in inches
_COLUMNS = 3
_DPI = 110
_NAME_LENGTH = 60
_POINTS_PER_INCH = 72
_SCORE_LABELS = {'max_softmax': 'log-odds of max softmax', 'energy': 'energy'}
# Names may hold any character: $ must not start a formula.
_STYLE = {'text.parse_math': False, 'text.usetex': False, 'font.size': 9, 'legend.fontsize': 8}


def _as_png(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    @wraps(draw)
    def render(*args) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Glyph .* missing from')  # shown as a box
            draw(*args).savefig(buffer, format='png', dpi=_DPI)
        return buffer.getvalue()
    return render


def _character_width(size: float) -> float:
    """Width of a wide character in inches."""
    return 0.66 * size / _POINTS_PER_INCH


def _wrap(text: str, inches: float, size: float) -> str:
    """Break a text into lines that fit a width."""
    return textwrap.fill(text, max(int(inches / _character_width(size)), 8), break_on_hyphens=False)


def _names(results: Sequence[Result]) -> list[str]:
    return short_names([result.name for result in results], _NAME_LENGTH)


def _panels(count: int, height: float = _HEIGHT, columns: int = _COLUMNS) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(_WIDTH * columns, height * rows), layout='constrained')  # no pyplot: it has global state
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _rows(titles: Sequence[str], width: float, height: float) -> tuple[Figure, list[FigureBase]]:
    """A figure with a part for each title, below one another; the titles are wrapped to the width."""
    lines = [_wrap(title, width - 0.2, 9) for title in titles]
    heights = [height + 0.16 * (line.count('\n') + 1) for line in lines]
    figure = Figure(figsize=(width, sum(heights)), layout='constrained')
    parts = figure.subfigures(len(titles), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, line in zip(parts, lines, strict=True):
        part.suptitle(line, x=0.01, ha='left', fontsize=9)
    return figure, list(parts)


def _limits(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis with a margin, so that no curve touches the frame."""
    margin = 0.04 * (high - low) or 0.04
    return low - margin, high + margin


def _add_legend(figure: Figure, axis: Axes, names: Sequence[str]) -> None:
    """A legend of the first lines of an axis, above all panels."""
    width = figure.get_figwidth() - 1
    # matplotlib leaves out labels that start with an underscore
    labels = [_wrap(f' {name}' if name.startswith('_') else name, width, 8) for name in names]
    fits = sum(map(len, labels)) * _character_width(8) + 0.6 * len(labels) < width
    figure.legend(axis.lines[:len(names)], labels, loc='outside upper left', ncols=len(names) if fits else 1)


def _set_title(axis: Axes, name: str) -> None:
    axis.set_title(_wrap(name, _WIDTH - 0.5, 9), fontsize=9)


@_as_png
def reliability_figure(results: Sequence[Result]) -> Figure:
    """Accuracy against confidence, before and after division by a temperature; a panel for each model."""
    figure, axes = _panels(len(results))
    for axis, name, result in zip(axes, _names(results), results, strict=True):
        tempered = result.values['tempered'].get('reliability')
        before = result.values['reliability']
        width = 1 / len(before['count'])
        axis.plot([0, 1], [0, 1], color='0.6', linestyle='--', linewidth=1)
        axis.bar([width * (k + 0.5) for k in range(len(before['count']))], before['accuracy'], 0.9 * width,
                 color='tab:blue', alpha=0.4, label='accuracy in bin')
        axis.plot(before['confidence'], before['accuracy'], 'o-', color='tab:blue', markersize=3, label='as trained')
        if tempered:
            axis.plot(tempered['confidence'], tempered['accuracy'], 's-', color='tab:orange', markersize=3,
                      label='at temperature')
        axis.set(xlabel='confidence', ylabel='accuracy', xlim=_limits(0, 1), ylim=_limits(0, 1))
        _set_title(axis, name)
        axis.legend()
    return figure


@_as_png
def attacks_figure(results: Sequence[Result]) -> Figure:
    """Accuracy against the size of FGSM and PGD."""
    figure, axes = _panels(2)
    for axis, attack in zip(axes, ('fgsm', 'pgd'), strict=True):
        for result in results:
            curve = result.values['attacks']
            axis.plot(curve['epsilon_of_255'], curve[attack], 'o-', markersize=3)
        axis.set(title=attack.upper(), xlabel='epsilon (of 255)', ylabel='top-1 accuracy, %', ylim=_limits(0, 100))
    _add_legend(figure, axes[0], _names(results))
    return figure


@_as_png
def corruptions_figure(results: Sequence[Result]) -> Figure:
    """Accuracy against the severity of each kind of corruption."""
    kinds = list(results[0].values['corruptions']['top1'])
    figure, axes = _panels(len(kinds), 2.4)
    for axis, kind in zip(axes, kinds, strict=True):
        for result in results:
            curve = result.values['corruptions']
            axis.plot([0, *curve['severities']], [curve['clean_top1'], *curve['top1'][kind]], 'o-', markersize=3)
        axis.set(title=kind, xlabel='severity', ylabel='top-1 accuracy, %', ylim=_limits(0, 100))
    _add_legend(figure, axes[0], _names(results))
    return figure


@_as_png
def ood_figure(results: Sequence[Result], score: str) -> Figure:
    """Histograms of a score in distribution and out of distribution; a row for each model, a column for each source."""
    sources = list(results[0].pictures['scores']['outside'])
    titles = short_names(sources, _NAME_LENGTH)
    width = min(_WIDTH, 14 / len(sources))
    figure, rows = _rows(_names(results), max(width * len(sources), 4), 2.4)
    for row, result in zip(rows, results, strict=True):
        scores = result.pictures['scores']
        axes = row.subplots(1, len(sources), squeeze=False)[0]
        for axis, source, title in zip(axes, sources, titles, strict=True):
            inside, outside = scores['inside'][score], scores['outside'][source][score]
            both = torch.cat([inside, outside])
            bins = np.linspace(both.min().item(), both.max().item() + 1e-9, 41)
            for values, label in ((inside, 'in distribution'), (outside, 'OOD')):
                axis.hist(values.tolist(), bins, histtype='stepfilled', density=True, alpha=0.5, label=label)
            axis.set_title(_wrap(title, width - 0.2, 8), fontsize=8)
            axis.set(yticks=[], xlabel=_SCORE_LABELS[score])
        axes[0].legend(fontsize=7)
    return figure


@_as_png
def embeddings_figure(results: Sequence[Result]) -> Figure:
    """t-SNE of the embeddings, coloured by class; a panel for each model."""
    figure, axes = _panels(len(results))
    for axis, name, result in zip(axes, _names(results), results, strict=True):
        points, classes = result.pictures['points'], result.pictures['classes']
        colours = 'tab10' if classes.max() < 10 else 'nipy_spectral'
        axis.scatter(*points.T.tolist(), c=classes.tolist(), cmap=colours, s=6)
        axis.set(xticks=[], yticks=[])
        _set_title(axis, name)
    return figure


@_as_png
def between_figure(results: Sequence[Result]) -> Figure:
    """Confidence and entropy on mixes of two images, against the weight of the first."""
    figure, axes = _panels(2)
    for axis, quantity in zip(axes, ('confidence', 'entropy'), strict=True):
        curves = [result.values['between'][quantity] for result in results]
        for result, curve in zip(results, curves, strict=True):
            axis.plot(result.values['between']['shares'], curve, 'o-', markersize=3)
        axis.set(xlabel='weight of the first image', ylabel='entropy, nats' if quantity == 'entropy' else quantity,
                 ylim=_limits(0, max(map(max, curves))))
    _add_legend(figure, axes[0], _names(results))
    return figure


@_as_png
def attention_figure(results: Sequence[Result]) -> Figure:
    """Sample images, and below them the attention of each model."""
    images = results[0].pictures['images']
    width = max(1.25 * len(images), 4)
    figure, rows = _rows(['images', *_names(results)], width, 1.25)
    for axis, image in zip(_image_axes(rows[0], len(images)), images, strict=True):
        axis.imshow(image[:3].movedim(0, -1).expand(-1, -1, 3).numpy())
    for row, result in zip(rows[1:], results, strict=True):
        shown, maps = result.pictures['images'], result.pictures['maps']
        maps = F.interpolate(maps[:, None], shown.shape[-2:], mode='nearest')[:, 0]
        for axis, image, weights in zip(_image_axes(row, len(images)), shown, maps, strict=True):
            axis.imshow(image.mean(0).numpy(), cmap='gray', vmin=0, vmax=1)
            axis.imshow(weights.numpy(), cmap='inferno', alpha=0.6, vmin=0)
    return figure


def _image_axes(part: FigureBase, count: int) -> list[Axes]:
    axes = list(part.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.set_axis_off()
    return axes
