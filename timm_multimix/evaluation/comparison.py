"""Rows of the comparison of models, grouped by topic."""
import math
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any, NamedTuple

from ..common.errors import printable
from .ood import SCORES
from .robustness import PIXEL_LEVELS
from .suite import Result

_SOURCE_LENGTH = 40
# Topic, label, value, format and direction of a measure: 1 if higher is better, -1 if lower is better, 0 if neither.
_Row = tuple[str, str, Any, str, int]


def abbreviate(names: Sequence[str], length: int) -> list[str]:
    """Replace the middle of long names by an ellipsis. Names that would become equal are numbered."""
    def shorten(name: str, length: int) -> str:
        end = (length - 1) // 2
        return name if len(name) <= length else f'{name[:length - 1 - end]}\N{HORIZONTAL ELLIPSIS}{name[-end:]}'

    names = [printable(name) for name in names]
    short = [shorten(name, length) for name in names]
    if len(set(short)) < len(short):
        short = [f'{number}: {shorten(name, length - 4)}' for number, name in enumerate(names, 1)]
    return short


def _rows(values: dict[str, Any]) -> Iterator[_Row]:
    """Yield the measures of a model."""
    def section(topic: str, name: str, *measures: tuple[str, str, str, int]) -> list[_Row]:
        measured = values.get(name, {})
        return [(topic, label, measured[key], spec, better) for label, key, spec, better in measures if key in measured]

    yield 'Model', 'weights', values['weights'], 's', 0
    yield 'Model', 'images', values['num_images'], 'd', 0
    yield from section('Accuracy', 'metrics', ('top-1 %', 'top1', '.2f', 1), ('top-5 %', 'top5', '.2f', 1))
    for label, key, spec in (
            ('NLL', 'nll', '.4f'), ('Brier', 'brier', '.4f'), ('ECE %', 'ece', '.2f'),
            ('adaptive ECE %', 'adaptive_ece', '.2f'), ('class-wise ECE %', 'classwise_ece', '.2f')):
        yield from section('Calibration', 'metrics', (label, key, spec, -1))
        yield from section('Calibration', 'tempered', (f'{label} at temperature', key, spec, -1))
    if temperatures := values['tempered'].get('temperatures'):
        yield 'Calibration', 'temperature', ', '.join(f'{temperature:.3g}' for temperature in temperatures), 's', 0
    yield from section(
        'Selective classification', 'metrics', ('AURC %', 'aurc', '.3f', -1),
        ('coverage at 5 % risk, %', 'coverage_at_5_risk', '.2f', 1))
    if attacks := values.get('attacks'):
        for name in ('fgsm', 'pgd'):
            for epsilon, accuracy in zip(attacks['epsilon_of_255'], attacks[name], strict=True):
                if epsilon:
                    label = f'{name.upper()} {epsilon:g}/{PIXEL_LEVELS}, top-1 %'
                    yield 'Robustness to attacks', label, accuracy, '.2f', 1
    topic = 'Robustness to corruptions'
    yield from section(topic, 'corruptions', ('mean over corruptions, top-1 %', 'mean_top1', '.2f', 1))
    for kind, accuracies in values.get('corruptions', {}).get('top1', {}).items():
        yield topic, f'{kind}, top-1 %', mean(accuracies), '.2f', 1
    sources = values.get('ood', {})
    for source, shown in zip(sources, abbreviate(list(sources), _SOURCE_LENGTH), strict=True):
        for score in SCORES:
            for key, label, better in (
                    ('auroc', 'AUROC', 1), ('aupr_in', 'AUPR in', 1), ('aupr_out', 'AUPR out', 1),
                    ('fpr95', 'FPR at 95 % TPR', -1), ('accuracy', 'detection accuracy', 1)):
                label = f'{shown}, {score.replace("_", " ")}: {label} %'
                yield 'Out-of-distribution detection', label, sources[source][score][key], '.2f', better
    yield from section(
        'Embeddings', 'embeddings', ('alignment', 'alignment', '.4f', -1), ('uniformity', 'uniformity', '.4f', -1),
        ('class compactness', 'compactness', '.4f', -1))
    yield from section(
        'Mixed images', 'between', ('mean confidence', 'mean_confidence', '.4f', 0),
        ('mean entropy', 'mean_entropy', '.4f', 0), ('third class predicted %', 'misses_percent', '.2f', -1),
        ('manifold intrusions, mixed images %', 'intrusions_of_images_percent', '.2f', -1),
        ('manifold intrusions, mixed embeddings %', 'intrusions_of_embeddings_percent', '.2f', -1))


class Line(NamedTuple):
    """A row of the comparison.

    Attributes:
        label: Name of the measure, with an arrow towards better values.
        cells: Formatted value of each model, '-' if it was not measured.
        best: Whether each value is the best of the row.
    """
    label: str
    cells: list[str]
    best: list[bool]


def _line(label: str, spec: str, better: int, values: Sequence[Any]) -> Line:
    cells = ['-' if value is None else format(value, spec) for value in values]
    best = [False] * len(cells)
    if better and len(set(cells)) > 1:  # no best value if all are equal
        known = [better * value for value in values if value is not None and not math.isnan(value)]
        best = [bool(known) and cell == format(better * max(known), spec) for cell in cells]
    return Line(label + {1: ' \N{UPWARDS ARROW}', -1: ' \N{DOWNWARDS ARROW}', 0: ''}[better], cells, best)


def compare(results: Sequence[Result]) -> dict[str, list[Line]]:
    """Return the lines of the comparison of models, by topic."""
    topics: dict[str, dict[tuple[str, str, int], list[Any]]] = {}
    for index, result in enumerate(results):
        for topic, label, value, spec, better in _rows(result.values):
            values = topics.setdefault(topic, {}).setdefault((label, spec, better), [None] * len(results))
            values[index] = value
    return {topic: [_line(*row, values) for row, values in rows.items()] for topic, rows in topics.items()}
