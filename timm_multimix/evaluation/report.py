"""Results as a table for the terminal, and as one HTML page without scripts and external files."""
import base64
from collections.abc import Iterator, Sequence
from html import escape

from ..common.errors import printable
from . import figures
from .comparison import abbreviate, compare
from .suite import Result

_NAME_LENGTH = 32
_ARROWS = '\N{UPWARDS ARROW} higher is better, \N{DOWNWARDS ARROW} lower is better'


def render_table(results: Sequence[Result]) -> str:
    """Render the comparison for a terminal. The best value of each row is marked by *."""
    rows = [('', abbreviate([result.name for result in results], _NAME_LENGTH))]
    for topic, lines in compare(results).items():
        rows += [('', []), (topic.upper(), [])]
        rows += [(line.label, [cell + ' *'[best] for cell, best in zip(line.cells, line.best, strict=True)])
                 for line in lines]
    first = max(len(label) for label, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows if cells), strict=True)]
    table = ['  '.join([label.ljust(first), *map(str.rjust, cells, widths)]).rstrip() for label, cells in rows]
    best = '* best value of the row; ' if len(results) > 1 else ''
    return '\n'.join([*table, '', best + _ARROWS])


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem 2rem; overflow-wrap: anywhere; }
.report, .figures { display: flex; flex-wrap: wrap; gap: 2rem 3rem; align-items: flex-start; }
.comparison { flex: 1 1 30rem; overflow-x: auto; }
.figures { flex: 2 1 45rem; }
.figures section { flex: 1 1 36rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
tbody th { font-weight: 400; text-align: left; min-width: 14rem; }
tbody th.topic, .best { font-weight: 700; }
figure { margin: 0; } img { max-width: 100%; } figcaption, .note { color: #555; }
"""


def _sections(results: Sequence[Result]) -> Iterator[tuple[str, str, bytes]]:
    """Yield the title, caption and PNG of each figure."""
    def having(name: str) -> list[Result]:
        return [result for result in results if name in result.values or name in result.pictures]

    fitted_on = [result.values['tempered'].get('fitted_on') for result in results]
    yield ('Reliability',
           'Accuracy against confidence in 15 bins of equal width. A calibrated model lies on the dashed line. '
           f'Temperature fitted on: {next(filter(None, fitted_on), "nothing")}.', figures.reliability_figure(results))
    if some := having('attacks'):
        attacks = some[0].values['attacks']
        yield ('Robustness to attacks',
               f'Top-1 accuracy on {attacks["num_images"]} images. PGD takes {attacks["pgd_steps"]} steps from a '
               f'random start. Both follow the gradient of the {attacks["loss"]} loss.', figures.attacks_figure(some))
    if some := having('corruptions'):
        count = some[0].values['corruptions']['num_images']
        yield ('Robustness to corruptions', f'Top-1 accuracy on {count} images; severity 0 is the uncorrupted image.',
               figures.corruptions_figure(some))
    if some := having('scores'):
        for score, caption in (
                ('max_softmax', 'Log-odds log(p / (1 - p)) of the maximum softmax probability p.'),
                ('energy', 'Negative free energy: logsumexp of the logits.')):
            yield (f'Out-of-distribution detection: {score.replace("_", " ")}', caption,
                   figures.ood_figure(some, score))
    for title, name, draw, caption in (
            ('Embeddings', 'points', figures.embeddings_figure,
             't-SNE of the input of the classifier, colored by class. Distances between clusters mean little.'),
            ('Mixed images', 'between', figures.between_figure,
             'Mean over random pairs of images of different classes, interpolated pixel by pixel.'),
            ('Attention', 'maps', figures.attention_figure,
             'Attention of dense MultiMix (query gap, norm relu) over the positions of the feature map.')):
        if some := having(name):
            yield title, caption, draw(some)


def _table(results: Sequence[Result]) -> str:
    names = ''.join(
        f'<th scope="col" title="{escape(printable(result.values["origin"]))}">{escape(result.name)}</th>'
        for result in results)
    bodies = []
    for topic, lines in compare(results).items():
        rows = [f'<tr><th class="topic" scope="rowgroup" colspan="{len(results) + 1}">{topic}</th></tr>']
        for line in lines:
            cells = (f'<td{" class=best" if best else ""}>{escape(cell)}</td>'
                     for cell, best in zip(line.cells, line.best, strict=True))
            rows.append(f'<tr><th scope="row">{escape(line.label)}</th>{"".join(cells)}</tr>')
        bodies.append(f'<tbody>{"".join(rows)}</tbody>')
    return f'<table><thead><tr><td></td>{names}</tr></thead>{"".join(bodies)}</table>'


def render_html(results: Sequence[Result], source: str, seed: int) -> str:
    """Render the report with the figures embedded. `source` describes the evaluated images."""
    title = escape(f'Evaluation of {", ".join(result.name for result in results)}')
    best = 'Bold: best value of the row. ' if len(results) > 1 else ''
    sections = ''.join(
        f'<section><h2>{heading}</h2><figure><img alt="{heading}" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode("ascii")}"><figcaption>{escape(caption)}</figcaption></figure></section>'
        for heading, caption, png in _sections(results))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>'
        f'<p class="note">Images: {escape(source)}. Seed: {seed}. {best}{_ARROWS}.</p>'
        f'<div class="report"><div class="comparison" style="flex-basis: {18 + 6 * len(results)}rem">'
        f'{_table(results)}</div><div class="figures">{sections}</div></div></body></html>\n')
