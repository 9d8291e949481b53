"""Read, continue and plot the summary of a run (summary.csv)."""
import csv
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..build.saved_weights import split_metric
from ..common.errors import UsageError
from ..common.files import replacing

SUMMARY_NAME = 'summary.csv'
_PANELS = {'loss': 'loss', 'top-1 accuracy (%)': 'top1', 'mean average precision (%)': 'map'}


def _read_table(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns of a summary and its rows with an epoch, empty if there is no file or a link."""
    if os.path.islink(path) or not os.path.exists(path):
        return [], []
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if (row.get('epoch') or '').isdecimal()]
            return list(reader.fieldnames or ()), rows
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror or error}.') from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f'{path} is not a CSV file in UTF-8 ({error}). Convert it, or rename it to start a new one.') from error


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    """Return the finite numbers in a row."""
    values = {}
    for name, text in row.items():
        with suppress(TypeError, ValueError):  # an incomplete line
            values[name] = float(text)
    return {name: value for name, value in values.items() if math.isfinite(value)}


def read_summary(folder: str) -> list[dict[str, float]]:
    """Return the finite values of each row of summary.csv in a run folder, empty if there is no summary.

    Raises:
        UsageError: if summary.csv is not a CSV file in UTF-8.
    """
    return [_numbers(row) for row in _read_table(os.path.join(folder, SUMMARY_NAME))[1]]


def add_row(path: str, row: Mapping[str, Any]) -> None:
    """Append the row of an epoch to a summary. Rows of this epoch and later ones, from before a resume, are removed.

    Missing columns are added, because a continued run may have other columns than before.
    """
    columns, rows = _read_table(path)
    kinds = ('epoch', 'train_', 'eval_', '')
    every = dict.fromkeys([*columns, *row])
    columns = sorted(every, key=lambda name: next(i for i, kind in enumerate(kinds) if name.startswith(kind)))
    with replacing(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, restval='', extrasaction='ignore')
        writer.writeheader()
        writer.writerows([*(earlier for earlier in rows if int(earlier['epoch']) < row['epoch']), row])


def draw_curve(rows: Sequence[Mapping[str, float]], path: str) -> bool:
    """Plot loss, top-1 accuracy and mean average precision over the epochs of rows from read_summary to an image file.

    Returns:
        Whether a plot was written. It needs at least two rows.
    """
    from ..common.figures import panels  # imports matplotlib, which training does not need

    curves = {
        title: (f'train_{name}', *(f'eval_{prefix}{name}' for prefix in ('', 'student_', 'ema_', 'teacher_')))
        for title, name in _PANELS.items()}
    curves = {title: names for title, names in curves.items() if any(name in row for row in rows for name in names)}
    if len(rows) < 2 or not curves:
        return False
    figure, all_axes = panels(len(curves), 4.5, 3.2)
    for axes, (title, names) in zip(all_axes, curves.items(), strict=True):
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
