"""Rows of the comparison of models, grouped by topic."""
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import ood
from .corruptions import CORRUPTIONS
from .names import short_names
from .robustness import PIXEL_LEVELS
from .suite import Result

_SOURCE_LENGTH = 40
_DETECTION = (
    ('auroc', 'AUROC', 1), ('aupr_in', 'AUPR in', 1), ('aupr_out', 'AUPR out', 1), ('fpr95', 'FPR at 95 % TPR', -1),
    ('accuracy', 'detection accuracy', 1))


class Row(NamedTuple):
    """One measure.

    Attributes:
        label: Name of the measure.
        read: Reads it from the values of a result; raises KeyError if it was not measured.
        spec: Format specification.
        better: 1 if higher is better, -1 if lower is better, 0 if neither.
    """
    label: str
    read: Callable[[dict[str, Any]], Any]
    spec: str = '.4f'
    better: int = 0


def _metric(label: str, name: str, spec: str, better: int) -> list[Row]:
    """A metric of the logits, and the same at temperature if that is measured."""
    return [
        Row(label, lambda v: v['metrics'][name], spec, better),
        Row(f'{label} at temperature', lambda v: v['tempered'][name], spec, better),
    ]


def _temperature(values: dict[str, Any]) -> str:
    return ', '.join(f'{temperature:.3g}' for temperature in values['tempered']['temperatures'])


def _attack_rows(results: Sequence[Result]) -> list[Row]:
    sizes = next((result.values['attacks']['epsilon_of_255'] for result in results if 'attacks' in result.values), ())
    return [
        Row(f'{name.upper()} {epsilon:g}/{PIXEL_LEVELS}, top-1 %', lambda v, n=name, i=index: v['attacks'][n][i],
            '.2f', 1)
        for name in ('fgsm', 'pgd') for index, epsilon in enumerate(sizes) if epsilon]


def _corruption_rows() -> list[Row]:
    kinds = [
        Row(f'{kind}, top-1 %', lambda v, k=kind: sum(v['corruptions']['top1'][k]) / len(v['corruptions']['top1'][k]),
            '.2f', 1)
        for kind in CORRUPTIONS]
    return [Row('mean over corruptions, top-1 %', lambda v: v['corruptions']['mean_top1'], '.2f', 1), *kinds]


def _detection_rows(results: Sequence[Result]) -> list[Row]:
    sources = list(dict.fromkeys(source for result in results for source in result.values.get('ood', ())))
    return [
        Row(f'{shown}, {score.replace("_", " ")}: {label} %',
            lambda v, s=source, k=score, n=name: v['ood'][s][k][n], '.2f', better)
        for source, shown in zip(sources, short_names(sources, _SOURCE_LENGTH), strict=True)
        for score in ood.SCORES
        for name, label, better in _DETECTION]


def _topics(results: Sequence[Result]) -> dict[str, list[Row]]:
    return {
        'Model': [
            Row('weights', lambda v: v['weights'], 's'),
            Row('images', lambda v: v['num_images'], 'd'),
        ],
        'Accuracy': [
            Row('top-1 %', lambda v: v['metrics']['top1'], '.2f', 1),
            Row('top-5 %', lambda v: v['metrics']['top5'], '.2f', 1),
        ],
        'Calibration': [
            *_metric('NLL', 'nll', '.4f', -1),
            *_metric('Brier', 'brier', '.4f', -1),
            *_metric('ECE %', 'ece', '.2f', -1),
            *_metric('adaptive ECE %', 'adaptive_ece', '.2f', -1),
            *_metric('class-wise ECE %', 'classwise_ece', '.2f', -1),
            Row('temperature', _temperature, 's'),
        ],
        'Selective classification': [
            Row('AURC %', lambda v: v['metrics']['aurc'], '.3f', -1),
            Row('coverage at 5 % risk, %', lambda v: v['metrics']['coverage_at_5_risk'], '.2f', 1),
        ],
        'Robustness to attacks': _attack_rows(results),
        'Robustness to corruptions': _corruption_rows(),
        'Out-of-distribution detection': _detection_rows(results),
        'Embeddings': [
            Row('alignment', lambda v: v['embeddings']['alignment'], '.4f', -1),
            Row('uniformity', lambda v: v['embeddings']['uniformity'], '.4f', -1),
            Row('class compactness', lambda v: v['embeddings']['compactness'], '.4f', -1),
        ],
        'Mixed images': [
            Row('mean confidence', lambda v: v['between']['mean_confidence']),
            Row('mean entropy', lambda v: v['between']['mean_entropy']),
            Row('third class predicted %', lambda v: v['between']['misses_percent'], '.2f', -1),
            Row('manifold intrusions, mixed images %', lambda v: v['between']['intrusions_of_images_percent'],
                '.2f', -1),
            Row('manifold intrusions, mixed embeddings %',
                lambda v: v['between']['intrusions_of_embeddings_percent'], '.2f', -1),
        ],
    }


class Line(NamedTuple):
    """A row with its values.

    Attributes:
        label: Name of the measure, with an arrow towards better values.
        cells: Formatted value of each model.
        best: Whether each value is the best of the row.
    """
    label: str
    cells: list[str]
    best: list[bool]


def _line(row: Row, results: Sequence[Result]) -> Line | None:
    """The values of a row, None if no model has one."""
    values = []
    for result in results:
        try:
            values.append(row.read(result.values))
        except KeyError:
            values.append(None)
    if all(value is None for value in values):
        return None
    cells = ['-' if value is None else format(value, row.spec) for value in values]
    best = [False] * len(cells)
    if row.better and len(results) > 1:
        known = [row.better * value for value in values if value is not None and not math.isnan(value)]
        shown = format(row.better * max(known), row.spec) if known else None
        best = [cell == shown and len(set(cells)) > 1 for cell in cells]  # no best value where all are equal
    arrow = {1: ' \N{UPWARDS ARROW}', -1: ' \N{DOWNWARDS ARROW}', 0: ''}[row.better]
    return Line(row.label + arrow, cells, best)


def compare(results: Sequence[Result]) -> dict[str, list[Line]]:
    """Compare models.

    Returns:
        For each topic that was measured, its lines.
    """
    topics = {
        topic: [line for row in rows if (line := _line(row, results)) is not None]
        for topic, rows in _topics(results).items()}
    return {topic: lines for topic, lines in topics.items() if lines}
