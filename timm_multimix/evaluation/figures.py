"""Figures of the report."""
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from ..common.figures import as_png, panels
from .names import short_names
from .suite import Result

_WIDTH, _HEIGHT = 3.6, 3.2  # of one panel, in inches
_NAME_LENGTH = 60
_POINTS_PER_INCH = 72
_SCORE_LABELS = {'max_softmax': 'log-odds of max softmax', 'energy': 'energy'}


def _character_width(size: float) -> float:
    """Width of a wide character in inches."""
    return 0.66 * size / _POINTS_PER_INCH


def _wrap(text: str, inches: float, size: float) -> str:
    """Break a text into lines that fit a width."""
    return textwrap.fill(text, max(int(inches / _character_width(size)), 8), break_on_hyphens=False)


def _names(results: Sequence[Result]) -> list[str]:
    return short_names([result.name for result in results], _NAME_LENGTH)


def _panel_for_each(results: Sequence[Result]) -> tuple[Figure, list[tuple[Axes, Result]]]:
    """A figure with a panel for each model, under its name."""
    figure, axes = panels(len(results), _WIDTH, _HEIGHT)
    for axis, name in zip(axes, _names(results), strict=True):
        axis.set_title(_wrap(name, _WIDTH - 0.5, 9), fontsize=9)
    return figure, list(zip(axes, results, strict=True))


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


def _curves(
        results: Sequence[Result],
        curve: Callable[[Result, str], tuple[Sequence[float], Sequence[float]]],
        quantities: dict[str, dict[str, Any]],
        height: float = _HEIGHT,
) -> Figure:
    """A panel with the curves of all models for each quantity, and a legend above all panels.

    Args:
        results: The models.
        curve: Returns x and y of a quantity.
        quantities: Properties of the axes of each quantity. The y axis begins at 0, and ends at `ylim` if it is given.
        height: Height of a panel in inches.
    """
    figure, axes = panels(len(quantities), _WIDTH, height)
    for axis, (quantity, options) in zip(axes, quantities.items(), strict=True):
        curves = [curve(result, quantity) for result in results]
        for x, y in curves:
            axis.plot(x, y, 'o-', markersize=3)
        axis.set(**options | dict(ylim=_limits(0, options.get('ylim') or max(max(y) for _, y in curves))))
    width = figure.get_figwidth() - 1
    # matplotlib leaves out labels that start with an underscore
    labels = [_wrap(f' {name}' if name.startswith('_') else name, width, 8) for name in _names(results)]
    fits = sum(map(len, labels)) * _character_width(8) + 0.6 * len(labels) < width
    figure.legend(axes[0].lines, labels, loc='outside upper left', ncols=len(labels) if fits else 1)
    return figure


@as_png
def reliability_figure(results: Sequence[Result]) -> Figure:
    """Accuracy against confidence, before and after division by a temperature; a panel for each model."""
    figure, parts = _panel_for_each(results)
    for axis, result in parts:
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
        axis.legend()
    return figure


@as_png
def attacks_figure(results: Sequence[Result]) -> Figure:
    """Accuracy against the size of FGSM and PGD."""
    def curve(result: Result, attack: str) -> Any:
        return result.values['attacks']['epsilon_of_255'], result.values['attacks'][attack]

    return _curves(results, curve, {
        name: dict(title=name.upper(), xlabel='epsilon (of 255)', ylabel='top-1 accuracy, %', ylim=100)
        for name in ('fgsm', 'pgd')})


@as_png
def corruptions_figure(results: Sequence[Result]) -> Figure:
    """Accuracy against the severity of each kind of corruption."""
    def curve(result: Result, kind: str) -> Any:
        values = result.values['corruptions']
        return [0, *values['severities']], [values['clean_top1'], *values['top1'][kind]]

    return _curves(results, curve, {
        kind: dict(title=kind, xlabel='severity', ylabel='top-1 accuracy, %', ylim=100)
        for kind in results[0].values['corruptions']['top1']}, 2.4)


@as_png
def between_figure(results: Sequence[Result]) -> Figure:
    """Confidence and entropy on mixes of two images, against the weight of the first."""
    def curve(result: Result, quantity: str) -> Any:
        return result.values['between']['shares'], result.values['between'][quantity]

    return _curves(results, curve, {
        quantity: dict(xlabel='weight of the first image', ylabel=label)
        for quantity, label in (('confidence', 'confidence'), ('entropy', 'entropy, nats'))})


@as_png
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


@as_png
def embeddings_figure(results: Sequence[Result]) -> Figure:
    """t-SNE of the embeddings, coloured by class; a panel for each model."""
    figure, parts = _panel_for_each(results)
    for axis, result in parts:
        points, classes = result.pictures['points'], result.pictures['classes']
        colours = 'tab10' if classes.max() < 10 else 'nipy_spectral'
        axis.scatter(*points.T.tolist(), c=classes.tolist(), cmap=colours, s=6)
        axis.set(xticks=[], yticks=[])
    return figure


@as_png
def attention_figure(results: Sequence[Result]) -> Figure:
    """Sample images, and below them the attention of each model."""
    images = results[0].pictures['images']
    figure, rows = _rows(['images', *_names(results)], max(1.25 * len(images), 4), 1.25)
    axes = np.stack([row.subplots(1, len(images), squeeze=False)[0] for row in rows])
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes[0], images, strict=True):
        axis.imshow(image[:3].movedim(0, -1).expand(-1, -1, 3).numpy())
    for row, result in zip(axes[1:], results, strict=True):
        shown, maps = result.pictures['images'], result.pictures['maps']
        maps = F.interpolate(maps[:, None], shown.shape[-2:], mode='nearest')[:, 0]
        for axis, image, weights in zip(row, shown, maps, strict=True):
            axis.imshow(image.mean(0).numpy(), cmap='gray', vmin=0, vmax=1)
            axis.imshow(weights.numpy(), cmap='inferno', alpha=0.6, vmin=0)
    return figure
