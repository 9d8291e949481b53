"""Figures of the report. Each function returns a PNG."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.figures import as_png, panels
from .comparison import abbreviate
from .suite import Result

_WIDTH, _HEIGHT = 3.6, 3.2  # of one panel, in inches
_NAME_LENGTH = 40
_SHARE = (-0.04, 1.04)  # limits of an axis from 0 to 1, with a margin
_PERCENT = (-4, 104)
_Curve = tuple[Sequence[float], Sequence[float]]
_SCORE_LABELS = {'max_softmax': 'log-odds of max softmax', 'energy': 'energy'}


def _names(results: Sequence[Result]) -> list[str]:
    return abbreviate([result.name for result in results], _NAME_LENGTH)


def _panels(results: Sequence[Result]) -> tuple[Figure, list[tuple[Axes, Result]]]:
    """Return a figure with a panel for each model, with its name as title."""
    figure, axes = panels(len(results), _WIDTH, _HEIGHT)
    for axis, name in zip(axes, _names(results), strict=True):
        axis.set_title(name, fontsize=9)
    return figure, list(zip(axes, results, strict=True))


def _rows(titles: Sequence[str], columns: int, width: float, height: float) -> tuple[Figure, list[Sequence[Axes]]]:
    """Return a figure with a row of panels under each title."""
    figure = Figure(figsize=(max(width * columns, 4), (height + 0.3) * len(titles)), layout='constrained')
    parts = figure.subfigures(len(titles), 1, squeeze=False)[:, 0]
    for part, title in zip(parts, titles, strict=True):
        part.suptitle(title, x=0.01, ha='left', fontsize=9)
    return figure, [part.subplots(1, columns, squeeze=False)[0] for part in parts]


def _curves(results: Sequence[Result], curves: dict[str, list[_Curve]], height: float = _HEIGHT, **axes: Any) -> Figure:
    """Return a figure with a panel for each title, with the curves of all models."""
    figure, panel_axes = panels(len(curves), _WIDTH, height)
    for axis, (title, of_models) in zip(panel_axes, curves.items(), strict=True):
        for x, y in of_models:
            axis.plot(x, y, 'o-', markersize=3)
        axis.set(title=title, **axes)
    # matplotlib omits labels that start with an underscore
    figure.legend(panel_axes[0].lines, [f' {name}' for name in _names(results)], loc='outside upper left')
    return figure


@as_png
def reliability_figure(results: Sequence[Result]) -> Figure:
    """Plot accuracy against confidence, before and after division by a temperature, in a panel for each model."""
    figure, parts = _panels(results)
    for axis, result in parts:
        before, tempered = result.values['reliability'], result.values['tempered'].get('reliability')
        width = 1 / len(before['count'])
        axis.plot([0, 1], [0, 1], color='0.6', linestyle='--', linewidth=1)
        axis.bar([width * (k + 0.5) for k in range(len(before['count']))], before['accuracy'], 0.9 * width,
                 color='tab:blue', alpha=0.4, label='accuracy in bin')
        axis.plot(before['confidence'], before['accuracy'], 'o-', color='tab:blue', markersize=3, label='as trained')
        if tempered:
            axis.plot(tempered['confidence'], tempered['accuracy'], 's-', color='tab:orange', markersize=3,
                      label='at temperature')
        axis.set(xlabel='confidence', ylabel='accuracy', xlim=_SHARE, ylim=_SHARE)
        axis.legend()
    return figure


@as_png
def attacks_figure(results: Sequence[Result]) -> Figure:
    """Plot accuracy against the size of FGSM and PGD."""
    attacks = [result.values['attacks'] for result in results]
    return _curves(
        results, {name.upper(): [(one['epsilon_of_255'], one[name]) for one in attacks] for name in ('fgsm', 'pgd')},
        xlabel='epsilon (of 255)', ylabel='top-1 accuracy, %', ylim=_PERCENT)


@as_png
def corruptions_figure(results: Sequence[Result]) -> Figure:
    """Plot accuracy against the severity of each kind of corruption."""
    parts = [result.values['corruptions'] for result in results]
    return _curves(
        results, {kind: [([0, *one['severities']], [one['clean_top1'], *one['top1'][kind]]) for one in parts]
                  for kind in parts[0]['top1']},
        height=2.4, xlabel='severity', ylabel='top-1 accuracy, %', ylim=_PERCENT)


@as_png
def between_figure(results: Sequence[Result]) -> Figure:
    """Plot confidence and entropy on mixes of two images against the weight of the first image."""
    parts = [result.values['between'] for result in results]
    return _curves(
        results, {title: [(one['shares'], one[name]) for one in parts]
                  for name, title in dict(confidence='confidence', entropy='entropy, nats').items()},
        xlabel='weight of the first image')


@as_png
def ood_figure(results: Sequence[Result], score: str) -> Figure:
    """Plot histograms of a score, in a row for each model and a column for each source of images."""
    sources = list(results[0].pictures['scores']['outside'])
    figure, rows = _rows(_names(results), len(sources), min(_WIDTH, 14 / len(sources)), 2.4)
    for row, result in zip(rows, results, strict=True):
        scores = result.pictures['scores']
        for axis, source, title in zip(row, sources, abbreviate(sources, _NAME_LENGTH), strict=True):
            inside, outside = scores['inside'][score], scores['outside'][source][score]
            both = torch.cat([inside, outside])
            bins = np.linspace(both.min().item(), both.max().item() + 1e-9, 41)
            for values, label in ((inside, 'in distribution'), (outside, 'OOD')):
                axis.hist(values.tolist(), bins, histtype='stepfilled', density=True, alpha=0.5, label=label)
            axis.set_title(title, fontsize=8)
            axis.set(yticks=[], xlabel=_SCORE_LABELS[score])
        row[0].legend(fontsize=7)
    return figure


@as_png
def embeddings_figure(results: Sequence[Result]) -> Figure:
    """Plot t-SNE of the embeddings, colored by class, in a panel for each model."""
    figure, parts = _panels(results)
    for axis, result in parts:
        points, classes = result.pictures['points'], result.pictures['classes']
        colors = 'tab10' if classes.max() < 10 else 'nipy_spectral'
        axis.scatter(*points.T.tolist(), c=classes.tolist(), cmap=colors, s=6)
        axis.set(xticks=[], yticks=[])
    return figure


@as_png
def attention_figure(results: Sequence[Result]) -> Figure:
    """Show sample images, and below them the attention of each model."""
    images = results[0].pictures['images']
    figure, rows = _rows(['images', *_names(results)], len(images), 1.25, 1.25)
    for axis, image in zip(rows[0], images, strict=True):
        axis.imshow(image[:3].movedim(0, -1).expand(-1, -1, 3).numpy())
        axis.set_axis_off()
    for row, result in zip(rows[1:], results, strict=True):
        shown, maps = result.pictures['images'], result.pictures['maps']
        maps = F.interpolate(maps[:, None], shown.shape[-2:], mode='nearest')[:, 0]
        for axis, image, weights in zip(row, shown, maps, strict=True):
            axis.imshow(image.mean(0).numpy(), cmap='gray', vmin=0, vmax=1)
            axis.imshow(weights.numpy(), cmap='inferno', alpha=0.6, vmin=0)
            axis.set_axis_off()
    return figure
