"""Read, repair and plot the summary of a run (summary.csv)."""
import csv
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..build.saved_weights import split_metric
from ..common.errors import UsageError

SUMMARY_NAME = 'summary.csv'
_PANELS = {'loss': 'loss', 'top-1 accuracy (%)': 'top1', 'mean average precision (%)': 'map'}


def _read_table(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of a summary, empty if there is no file."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if row.get('epoch') != 'epoch']
            return list(reader.fieldnames or ()), rows
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror or error}.') from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f'{path} is not a CSV file in UTF-8 ({error}). Convert it, or rename it to start a new one.') from error


def _write_table(path: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, restval='', extrasaction='ignore')
        if columns:
            writer.writeheader()
        writer.writerows(rows)


def read_summary(folder: str) -> list[dict[str, float]]:
    """Return the finite values of each row of summary.csv in a run folder, empty if there is no summary.

    Raises:
        UsageError: if summary.csv is not a CSV file in UTF-8.
    """
    rows = []
    for row in _read_table(os.path.join(folder, SUMMARY_NAME))[1]:
        try:
            values = {name: float(value) for name, value in row.items() if name and value}
            rows.append({
                **{name: value for name, value in values.items() if math.isfinite(value)}, 'epoch': int(row['epoch'])})
        except (KeyError, TypeError, ValueError):
            continue  # an incomplete line
    return rows


def trim_summary(path: str, start_epoch: int) -> None:
    """Remove the rows of a summary from an epoch on, and incomplete rows. Nothing is written if there are none."""
    columns, rows = _read_table(path)
    valid = []
    for row in rows:
        with suppress(KeyError, TypeError, ValueError):
            if int(float(row['epoch'])) < start_epoch and None not in row:
                valid.append(row)
    if len(valid) < len(rows):
        _write_table(path, columns if valid else [], valid)


def add_row(path: str, row: Mapping[str, Any]) -> None:
    """Append a row to a summary, and add its missing columns: a continued run may have other columns than before."""
    columns, rows = _read_table(path)
    kinds = ('epoch', 'train_', 'eval_', '')
    every = dict.fromkeys([*columns, *row])
    columns = sorted(every, key=lambda name: next(i for i, kind in enumerate(kinds) if name.startswith(kind)))
    _write_table(path, columns, [*rows, row])


def draw_curve(rows: Sequence[Mapping[str, float]], path: str) -> bool:
    """Plot loss, top-1 accuracy and mean average precision over the epochs of rows from read_summary to an image file.

    Returns:
        Whether a plot was written. It needs at least two rows.
    """
    from matplotlib.figure import Figure  # without pyplot, which only works in the main thread

    panels = {
        title: (f'train_{name}', *(f'eval_{prefix}{name}' for prefix in ('', 'student_', 'ema_', 'teacher_')))
        for title, name in _PANELS.items()}
    panels = {title: names for title, names in panels.items() if any(name in row for row in rows for name in names)}
    if len(rows) < 2 or not panels:
        return False
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout='constrained')
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in names:
            points = [(row['epoch'], row[name]) for row in rows if name in row]
            if points:
                source = split_metric(name.removeprefix('eval_'))[0]
                label = 'training' if name.startswith('train') else f'validation, {source}' if source else 'validation'
                axes.plot(*zip(*points, strict=True), label=label, marker='.' if len(points) < 20 else None)
        axes.set(xlabel='epoch', title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    return True
