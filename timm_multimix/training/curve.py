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
