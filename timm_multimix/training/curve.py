"""What the summary of a run says, and its picture."""
import csv
import os
from collections.abc import Mapping, Sequence

from .saved_weights import split_metric

_PANELS = {'loss': 'loss', 'top-1 accuracy (%)': 'top1', 'mean average precision (%)': 'map'}


def read_summary(folder: str) -> list[dict[str, float]]:
    """Read summary.csv.

    Returns:
        A row for each validated epoch, in order, with the values that it has; none if there is no summary.
    """
    rows = []
    try:
        with open(os.path.join(folder, 'summary.csv'), newline='', encoding='utf-8') as file:
            for row in csv.DictReader(file):
                try:
                    values = {name: float(value) for name, value in row.items() if name and value}
                    rows.append({**values, 'epoch': int(row['epoch'])})
                except (KeyError, TypeError, ValueError):
                    continue  # a line that is only half written
    except OSError:
        pass
    return rows


def fit_columns(path: str, names: Sequence[str]) -> list[str]:
    """Give a summary all columns that its next row needs: a run may continue with other weights to validate.

    Args:
        path: The summary, which is written again only if it lacks columns.
        names: Columns of the next row, of which the last one stays the last.

    Returns:
        All columns, with those that earlier rows have.
    """
    if not os.path.isfile(path) or not os.path.getsize(path):
        return list(names)
    with open(path, newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file)
        before, rows = list(reader.fieldnames or ()), list(reader)
    kinds = ('epoch', 'train_', 'eval_', '')
    every = dict.fromkeys([*before, *names])
    columns = sorted(every, key=lambda name: next(i for i, kind in enumerate(kinds) if name.startswith(kind)))
    if columns != before:
        with open(path, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, columns, restval='', extrasaction='ignore')
            writer.writeheader()
            writer.writerows(rows)
    return columns


def draw_curve(rows: Sequence[Mapping[str, float]], path: str) -> bool:
    """Draw loss and accuracy over the epochs.

    Args:
        rows: From read_summary.
        path: Picture to write.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure  # without pyplot, which belongs to the main thread

    panels = {
        title: (f'train_{name}', *(f'eval_{who}{name}' for who in ('', 'ema_', 'teacher_')))
        for title, name in _PANELS.items()}
    panels = {title: names for title, names in panels.items() if any(name in row for row in rows for name in names)}
    if len(rows) < 2 or not panels:
        return False
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout='constrained')
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in names:
            points = [(row['epoch'], row[name]) for row in rows if name in row]
            if points:
                who = split_metric(name.removeprefix('eval_'))[0]
                label = 'training' if name.startswith('train') else f'validation, {who}' if who else 'validation'
                axes.plot(*zip(*points, strict=True), label=label, marker='.' if len(points) < 20 else None)
        axes.set(xlabel='epoch', title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    return True
