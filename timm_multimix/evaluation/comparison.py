"""Rows of the comparison of models, grouped by topic."""
import math
from collections.abc import Callable, Sequence
from statistics import mean
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
        path: Keys and indices that lead to it in the values of a result.
        spec: Format specification.
        better: 1 if higher is better, -1 if lower is better, 0 if neither.
        reduce: Applied to the value.
    """
    label: str
    path: tuple[str | int, ...]
    spec: str = '.4f'
    better: int = 0
    reduce: Callable[[Any], Any] = lambda value: value

    def read(self, result: Result) -> Any:
        """The value, None if it was not measured."""
        value = result.values
        try:
            for key in self.path:
                value = value[key]
        except KeyError:
            return None
        return self.reduce(value)


def _section(section: str, *rows: tuple[str, str, str, int]) -> list[Row]:
    """Rows from label, key, format and direction of measures of a section."""
    return [Row(label, (section, key), spec, better) for label, key, spec, better in rows]


def _calibration_rows() -> list[Row]:
    """Metrics of the logits, and the same at temperature if that is measured."""
    rows = [
        Row(f'{label}{suffix}', (section, key), spec, -1)
        for label, key, spec in (
            ('NLL', 'nll', '.4f'), ('Brier', 'brier', '.4f'), ('ECE %', 'ece', '.2f'),
            ('adaptive ECE %', 'adaptive_ece', '.2f'), ('class-wise ECE %', 'classwise_ece', '.2f'))
        for section, suffix in (('metrics', ''), ('tempered', ' at temperature'))]
    return [*rows, Row('temperature', ('tempered', 'temperatures'), 's', 0,
                       lambda temperatures: ', '.join(f'{temperature:.3g}' for temperature in temperatures))]


def _attack_rows(results: Sequence[Result]) -> list[Row]:
    sizes = next((result.values['attacks']['epsilon_of_255'] for result in results if 'attacks' in result.values), ())
    return [
        Row(f'{name.upper()} {epsilon:g}/{PIXEL_LEVELS}, top-1 %', ('attacks', name, index), '.2f', 1)
        for name in ('fgsm', 'pgd') for index, epsilon in enumerate(sizes) if epsilon]


def _detection_rows(results: Sequence[Result]) -> list[Row]:
    sources = list(dict.fromkeys(source for result in results for source in result.values.get('ood', ())))
    return [
        Row(f'{shown}, {score.replace("_", " ")}: {label} %', ('ood', source, score, key), '.2f', better)
        for source, shown in zip(sources, short_names(sources, _SOURCE_LENGTH), strict=True)
        for score in ood.SCORES
        for key, label, better in _DETECTION]


def _topics(results: Sequence[Result]) -> dict[str, list[Row]]:
    return {
        'Model': [Row('weights', ('weights',), 's'), Row('images', ('num_images',), 'd')],
        'Accuracy': _section('metrics', ('top-1 %', 'top1', '.2f', 1), ('top-5 %', 'top5', '.2f', 1)),
        'Calibration': _calibration_rows(),
        'Selective classification': _section(
            'metrics', ('AURC %', 'aurc', '.3f', -1), ('coverage at 5 % risk, %', 'coverage_at_5_risk', '.2f', 1)),
        'Robustness to attacks': _attack_rows(results),
        'Robustness to corruptions': [
            Row('mean over corruptions, top-1 %', ('corruptions', 'mean_top1'), '.2f', 1),
            *(Row(f'{kind}, top-1 %', ('corruptions', 'top1', kind), '.2f', 1, mean) for kind in CORRUPTIONS)],
        'Out-of-distribution detection': _detection_rows(results),
        'Embeddings': _section(
            'embeddings', ('alignment', 'alignment', '.4f', -1), ('uniformity', 'uniformity', '.4f', -1),
            ('class compactness', 'compactness', '.4f', -1)),
        'Mixed images': _section(
            'between', ('mean confidence', 'mean_confidence', '.4f', 0), ('mean entropy', 'mean_entropy', '.4f', 0),
            ('third class predicted %', 'misses_percent', '.2f', -1),
            ('manifold intrusions, mixed images %', 'intrusions_of_images_percent', '.2f', -1),
            ('manifold intrusions, mixed embeddings %', 'intrusions_of_embeddings_percent', '.2f', -1)),
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
    values = [row.read(result) for result in results]
    if all(value is None for value in values):
        return None
    cells = ['-' if value is None else format(value, row.spec) for value in values]
    best = [False] * len(cells)
    if row.better and len(set(cells)) > 1:  # no best value where all are equal
        known = [row.better * value for value in values if value is not None and not math.isnan(value)]
        best = [bool(known) and cell == format(row.better * max(known), row.spec) for cell in cells]
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
