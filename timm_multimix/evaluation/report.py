"""Results as a table on the terminal and as one HTML page that needs nothing else."""
import html
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import figures, ood
from .suite import Result, Settings


class Row(NamedTuple):
    """One line of the comparison.

    Attributes:
        label: What it is.
        read: Takes it from the values of a result; raises KeyError if it was not measured.
        spec: How to format it.
        better: 1 if more is better, -1 if less is, 0 if neither.
    """
    label: str
    read: Callable[[dict[str, Any]], Any]
    spec: str
    better: int


def _temperature(values: dict[str, Any]) -> str:
    return ', '.join(f'{temperature:.3g}' for temperature in values['tempered']['temperatures'])


def _rows(results: Sequence[Result]) -> list[Row]:
    rows = [
        Row('weights', lambda v: v['weights'], 's', 0),
        Row('images', lambda v: v['num_images'], 'd', 0),
        Row('top-1 %', lambda v: v['metrics']['top1'], '.2f', 1),
        Row('top-5 %', lambda v: v['metrics']['top5'], '.2f', 1),
        Row('NLL', lambda v: v['metrics']['nll'], '.4f', -1),
        Row('NLL at temperature', lambda v: v['tempered']['nll'], '.4f', -1),
        Row('ECE %', lambda v: v['metrics']['ece'], '.2f', -1),
        Row('ECE % at temperature', lambda v: v['tempered']['ece'], '.2f', -1),
        Row('Brier', lambda v: v['metrics']['brier'], '.4f', -1),
        Row('Brier at temperature', lambda v: v['tempered']['brier'], '.4f', -1),
        Row('temperature', _temperature, 's', 0),
    ]
    attacked = next((result.values['attacks'] for result in results if 'attacks' in result.values), None)
    for name in ('fgsm', 'pgd'):
        for index, epsilon in enumerate(attacked['epsilon_of_255'] if attacked else ()):
            if epsilon:
                label = f'{name.upper()} {epsilon:g}/255, top-1 %'
                rows.append(Row(label, lambda v, n=name, i=index: v['attacks'][n][i], '.2f', 1))
    for source in dict.fromkeys(source for result in results for source in result.values.get('ood', ())):
        for score in ood.SCORES:
            for name, label, better in (
                    ('auroc', 'AUROC', 1), ('aupr_in', 'AUPR in', 1), ('aupr_out', 'AUPR out', 1),
                    ('fpr95', 'FPR at 95 % TPR', -1), ('accuracy', 'detection accuracy', 1)):
                rows.append(Row(
                    f'{source}, {score.replace("_", " ")}: {label} %',
                    lambda v, s=source, k=score, n=name: v['ood'][s][k][n], '.2f', better))
    rows += [
        Row('alignment', lambda v: v['embeddings']['alignment'], '.4f', -1),
        Row('uniformity', lambda v: v['embeddings']['uniformity'], '.4f', -1),
        Row('compactness of classes', lambda v: v['embeddings']['compactness'], '.4f', -1),
        Row('confidence between images', lambda v: v['between']['mean_confidence'], '.4f', 0),
        Row('entropy between images', lambda v: v['between']['mean_entropy'], '.4f', 0),
        Row('third class predicted between %', lambda v: v['between']['misses_percent'], '.2f', -1),
        Row('intrusions of mixed images %', lambda v: v['between']['intrusions_of_images_percent'], '.2f', -1),
        Row('intrusions of mixed embeddings %', lambda v: v['between']['intrusions_of_embeddings_percent'], '.2f', -1),
    ]
    return rows


class Line(NamedTuple):
    """A row with its values: as text, and which of them are the best."""
    label: str
    cells: list[str]
    best: list[bool]


def comparison(results: Sequence[Result]) -> list[Line]:
    """What was measured of each model, side by side; an arrow says which way is better."""
    lines = []
    for row in _rows(results):
        values = []
        for result in results:
            try:
                values.append(row.read(result.values))
            except KeyError:
                values.append(None)
        if all(value is None for value in values):
            continue
        cells = ['-' if value is None else format(value, row.spec) for value in values]
        best = [False] * len(cells)
        if row.better and len(results) > 1:
            known = [row.better * value for value in values if value is not None and not math.isnan(value)]
            shown = format(row.better * max(known), row.spec) if known else None
            best = [cell == shown and len(set(cells)) > 1 for cell in cells]  # nobody is best where all are alike
        arrow = {1: ' \N{UPWARDS ARROW}', -1: ' \N{DOWNWARDS ARROW}', 0: ''}[row.better]
        lines.append(Line(row.label + arrow, cells, best))
    return lines


def render_table(results: Sequence[Result]) -> str:
    """The comparison for a terminal; the best of each row is starred."""
    table = [['', *(result.name for result in results)]]
    for line in comparison(results):
        cells = [cell + ('*' if best else ' ') for cell, best in zip(line.cells, line.best, strict=True)]
        table.append([line.label, *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in table)
    return '\n'.join('  '.join(line).rstrip() for line in lines)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } .best { font-weight: 700; }
img { max-width: 100%; } figcaption { color: #555; } figure { margin: 1.5rem 0; } h2 { margin-top: 2.5rem; }
"""


def _figure(title: str, caption: str, source: str) -> str:
    return (
        f'<section><h2>{html.escape(title)}</h2><figure><img alt="{html.escape(title)}" src="{source}">'
        f'<figcaption>{html.escape(caption)}</figcaption></figure></section>')


def _figures(results: Sequence[Result], settings: Settings) -> list[str]:
    fitted_on = [result.values['tempered'].get('fitted_on') for result in results]
    parts = [_figure(
        'Reliability',
        'Accuracy over confidence in 15 bins; on the dashed line a model is calibrated. The temperature was fitted on '
        f'{next(filter(None, fitted_on), "nothing")}.',
        figures.reliability_figure(results))]
    having = {
        name: [result for result in results if name in result.values or name in result.pictures]
        for name in ('attacks', 'scores', 'points', 'between', 'maps')}
    if having['attacks'] and settings.epsilons:
        parts.append(_figure(
            'Robustness',
            f'Accuracy under attack, on at most {settings.sample} images; PGD takes {settings.pgd_steps} steps from a '
            'random start.', figures.attacks_figure(having['attacks'])))
    if having['scores'] and settings.outside:
        parts += [
            _figure(f'Images of other kinds: {score.replace("_", " ")}', caption,
                    figures.ood_figure(having['scores'], score))
            for score, caption in (
                ('max_softmax', 'As log(p / (1 - p)) of the highest probability p.'),
                ('energy', 'Logarithm of the sum of exponentials of the logits.'))]
    if having['points']:
        parts.append(_figure(
            'Embeddings',
            't-SNE of what the classifier reads, coloured by class. Distances between groups mean little.',
            figures.embeddings_figure(having['points'])))
    if having['between']:
        parts.append(_figure(
            'Between two images', 'Mean over random pairs of images of different classes, mixed pixel by pixel.',
            figures.between_figure(having['between'])))
    if having['maps']:
        parts.append(_figure(
            'Attention',
            'Similarity of each position to the average of all (gap, relu), as dense MultiMix weights them.',
            figures.attention_figure(having['maps'])))
    return parts


def render_html(results: Sequence[Result], settings: Settings) -> str:
    """The report: one page with its pictures in it, and no script.

    Args:
        results: What was measured of each model.
        settings: How.
    """
    names = [html.escape(result.name) for result in results]
    origins = [html.escape(result.values['origin']) for result in results]
    head = ''.join(f'<th title="{origin}">{name}</th>' for origin, name in zip(origins, names, strict=True))
    body = ''.join(
        f'<tr><td>{html.escape(line.label)}</td>' + ''.join(
            f'<td class="best">{html.escape(cell)}</td>' if best else f'<td>{html.escape(cell)}</td>'
            for cell, best in zip(line.cells, line.best, strict=True)) + '</tr>'
        for line in comparison(results))
    title = f'Evaluation of {", ".join(names)}'
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'</head><body><h1>{title}</h1>'
        f'<p>Images: {html.escape(str(settings.source))}. Seed {settings.seed}. Bold is best.</p>'
        f'<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
        + ''.join(_figures(results, settings)) + '</body></html>\n')
