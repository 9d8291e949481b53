"""Tables and plots of a study."""
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy import stats


def mean_and_spread(values: list[float], digits: int) -> str:
    """Format mean ± standard deviation. The deviation is omitted for one value, or if a value is infinite."""
    has_spread = len(values) > 1 and all(map(math.isfinite, values))
    spread = f' ± {statistics.stdev(values):.{digits}f}' if has_spread else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'


def paired_difference(ours: Mapping[int, Mapping], theirs: Mapping[int, Mapping], metric: str):
    """Return the mean difference over common seeds, with its 95 % confidence interval (paired t-test).

    Returns:
        (mean, low, high), or None if there are fewer than two common seeds or a value is not finite.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    a, b = ([runs[seed][metric] for seed in seeds] for runs in (ours, theirs))
    if len(seeds) < 2 or not all(map(math.isfinite, a + b)):
        return None
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    return statistics.mean(a) - statistics.mean(b), float(interval.low), float(interval.high)


def best_baseline(rows: Mapping[str, Mapping[str, Any]], baselines: list[str]) -> str | None:
    """Return the baseline with the best mean validation accuracy, or None if no baseline has runs."""
    known = [name for name in baselines if name in rows and rows[name]['runs']]
    return max(known, default=None, key=lambda name: statistics.mean(
        run['validation'] for run in rows[name]['runs'].values()))


def rows_of(study, table, dataset: str, model: str) -> dict[str, dict[str, Any]]:
    return {g.method: row for g, row in table.items() if (g.dataset, g.model) == (dataset, model) and row['runs']}


def _row(name: str, rows: Mapping[str, Mapping], baseline: str | None, columns: tuple, metric: str) -> str:
    runs = rows[name]['runs']
    cells = [name, rows[name]['lr'], str(len(runs))]
    cells += [mean_and_spread([run[column] for run in runs.values()], digits) for column, _, digits, _ in columns]
    if baseline is None:
        return f'| {" | ".join(cells)} |'
    difference, relative = '', [''] if columns[0][0] == 'accuracy' else []
    if name != baseline:
        others = rows[baseline]['runs']
        compared = paired_difference(runs, others, metric)
        if compared:
            digits = next(digits for column, _, digits, _ in columns if column == metric)
            difference = f'{{:+.{digits}f}} [{{:+.{digits}f}}, {{:+.{digits}f}}]'.format(*compared)
        if relative:
            error, reference = (
                sum(100 - each[seed]['accuracy'] for seed in runs.keys() & others.keys()) for each in (runs, others))
            relative = [f'{100 * (error / reference - 1):+.0f} %' if reference else '']
    return f'| {" | ".join([*cells, difference, *relative])} |'


def report(study, table, metric: str | None = None) -> str:
    """Return a Markdown table for each dataset and model. The metric is compared with the best baseline."""
    metric, parts = metric or study.columns[0][0], []
    for dataset in study.datasets:
        for model in study.models:
            rows = rows_of(study, table, dataset, model)
            if not rows:
                continue
            baseline = best_baseline(rows, study.baselines)
            headings = ['method', 'lr', 'n', *(heading for _, heading, _, _ in study.columns)]
            if baseline is not None:
                headings += [f'{metric} over {baseline} [95 %]']
                headings += ['error'] if study.columns[0][0] == 'accuracy' else []
            parts.append(f'**{dataset}, {model}**\n\n| {" | ".join(headings)} |\n|{"---|" * len(headings)}\n'
                         + '\n'.join(_row(name, rows, baseline, study.columns, metric) for name in rows))
    return '\n\n'.join(parts) or 'No learning rate is tuned yet.'


def ranking(studies, tables, methods: list[str], metric: str) -> str:
    """Return a table with the mean rank of candidates for a default, and the settings in which they lose.

    A setting is a dataset and a model of a study in which all candidates have runs. A candidate loses to another one if
    the 95 % interval of the paired difference excludes zero.
    """
    is_higher_better = next(better for study in studies for name, _, _, better in study.columns if name == metric)
    sign, digits = (1, 2) if is_higher_better else (-1, 3)
    ranks, losses, settings = {name: [] for name in methods}, {name: [] for name in methods}, []
    for study, table in zip(studies, tables, strict=True):
        for dataset, model in ((dataset, model) for dataset in study.datasets for model in study.models):
            rows = rows_of(study, table, dataset, model)
            if not set(methods) <= set(rows):
                continue
            settings.append(f'{study.name}: {dataset}, {model}')
            # Rounded, because equal numbers of correct images can differ in the last digits.
            means = {name: round(sign * statistics.mean(run[metric] for run in rows[name]['runs'].values()), 4)
                     for name in methods}
            for name in methods:
                ranks[name].append(1 + sum(other > means[name] for other in means.values()))
                for other in methods:
                    compared = paired_difference(rows[name]['runs'], rows[other]['runs'], metric)
                    if name != other and compared and max(sign * compared[1], sign * compared[2]) < 0:
                        losses[name].append(f'{settings[-1]}: {compared[0]:+.{digits}f} to {other}')
    lines = [f'| {name} | {statistics.mean(ranks[name]):.2f} | {"; ".join(losses[name])} |'
             for name in sorted(methods, key=lambda name: sum(ranks[name]))] if settings else []
    return '\n'.join([
        f'Settings: {"; ".join(settings) or "none with runs of all methods"}', '',
        f'| method | mean rank, {metric} | loses by more than the 95 % interval |', '|---|---|---|', *lines])


def section(study, table, metric: str | None = None) -> str:
    """Return the report of a study with a heading."""
    return f'## {study.name}\n\n{study.about}\n\n{report(study, table, metric)}\n'


def page_header(paths: list[Path]) -> str:
    """Return the header of a page with the tables of several studies."""
    names = ' '.join(f'benchmarks/studies/{path.name}' for path in paths)
    return f"""# Tables of the studies

This page is generated from the runs in `benchmarks/results/`:

    python benchmarks/study.py {names} --report-only --tables docs/results_tables.md

[results.md](results.md) describes the data, the models, the columns and the conclusions. n is the number of seeds, ±
the standard deviation over seeds. * marks the lowest or highest learning rate that was tried.
"""


def plot(study, table, path: Path) -> None:
    """Plot the runs and their mean, with a row for each dataset and model and a column for each metric."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    panels = [(d, m) for d in study.datasets for m in study.models if rows_of(study, table, d, m)]
    metrics = study.columns[:4]
    figure, axes = plt.subplots(
        len(panels), len(metrics), squeeze=False, layout='constrained',
        figsize=(3 * len(metrics), len(panels) * (0.7 + 0.22 * len(study.methods))))
    for line, (dataset, model) in zip(axes, panels, strict=True):
        rows = rows_of(study, table, dataset, model)
        for axis, (metric, heading, _, _) in zip(line, metrics, strict=True):
            for y, (name, row) in enumerate(rows.items()):
                values = [run[metric] for run in row['runs'].values()]
                color = 'C0' if name in study.baselines else 'C1'
                axis.plot(values, [y] * len(values), 'o', color=color, alpha=0.4, markersize=4)
                axis.plot(statistics.mean(values), y, '|', color=color, markersize=14, markeredgewidth=2)
            axis.set_yticks(range(len(rows)), rows if axis is line[0] else [''] * len(rows))
            axis.invert_yaxis()
            axis.grid(axis='x', alpha=0.3)
            axis.set_title(f'{dataset}, {model}: {heading}' if axis is line[0] else heading, fontsize=9)
    figure.savefig(path)
    plt.close(figure)
