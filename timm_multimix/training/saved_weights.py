"""The sets of weights that a run keeps: their names, where checkpoints have them, whose metric is whose.

There are the trained weights ('student'), with --model-ema their average ('ema'), and with an EMA teacher its weights
('teacher'), which are the average where the two share one. Options and metrics call them by these names: --hub-weights
ema, --eval-metric teacher_top1.
"""
import argparse
import math
from collections.abc import Iterable, Mapping
from typing import Any

STUDENT, AVERAGE, TEACHER = 'student', 'ema', 'teacher'
_ENTRIES = {STUDENT: 'state_dict', AVERAGE: 'state_dict_ema', TEACHER: 'state_dict_teacher'}
WEIGHTS = tuple(_ENTRIES)
_DESCRIPTIONS = {
    STUDENT: 'the trained weights', AVERAGE: 'the average of the weights', TEACHER: "the teacher's weights"}


def arguments_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint, none if it does not know."""
    args = checkpoint.get('args') or {}
    return vars(args) if isinstance(args, argparse.Namespace) else args  # timm's own script saves a Namespace


def split_metric(name: str) -> tuple[str | None, str]:
    """Whose a metric is, None if nothing is said, and what it is called without that: 'teacher_top1'."""
    who, _, metric = name.partition('_')
    return (who, metric) if who in _ENTRIES else (None, name)


def entries(kept: Iterable[str], args: Mapping[str, Any]) -> dict[str, str]:
    """Where a checkpoint has the weights of each name.

    Args:
        kept: Names of its entries.
        args: Arguments of its run.
    """
    found = {who: entry for who, entry in _ENTRIES.items() if entry in kept}
    if STUDENT not in found and 'model' in kept:
        found[STUDENT] = 'model'
    teaches = args.get('multimix', 'off') != 'off' and args.get('multimix_teacher') == 'ema'
    if teaches and TEACHER not in found and AVERAGE in found:
        found[TEACHER] = found[AVERAGE]
    return found


def saved_weights(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """The entry of each set of weights that a checkpoint holds, by name. A calibrated one holds a set of another."""
    args = arguments_of(checkpoint)
    if 'weights_of' not in checkpoint:
        return entries(checkpoint, args)
    return {who: 'state_dict' for who in entries([checkpoint['weights_of']], args)}


def weights_of_metric(checkpoint: Mapping[str, Any]) -> str:
    """The entry of a checkpoint whose weights its metric is of: of the average, where nothing else is said."""
    names = (checkpoint.get('metric_of'), 'state_dict_ema', 'state_dict', 'model')
    return next(name for name in names if name in checkpoint)


def described(checkpoint: Mapping[str, Any], entry: str) -> str:
    """What the weights in an entry are, in words."""
    names = [who for who, where in saved_weights(checkpoint).items() if where == entry]
    return _DESCRIPTIONS[names[-1] if names else STUDENT]


def metrics_of(checkpoint: Mapping[str, Any], entry: str, eval_metric: str = '') -> dict[str, float]:
    """Finite metrics of the very weights in an entry, by timm's names, as far as a checkpoint knows them.

    Args:
        checkpoint: The checkpoint.
        entry: The entry.
        eval_metric: Name of the checkpoint's metric, which is all that timm's own say.
    """
    metrics = dict((checkpoint.get('metrics') or {}).get(entry, {}))
    if 'metrics' not in checkpoint and checkpoint.get('metric') is not None and entry == weights_of_metric(checkpoint):
        metrics = {split_metric(eval_metric)[1]: float(checkpoint['metric'])}
    if 'temperature' in checkpoint:
        metrics.pop('loss', None)  # calibration changes it, and no accuracy
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What becomes of the weights in a checkpoint that a run continues from, where they are not simply continued.

    Args:
        before: The entries of its weights, by name.
        now: Those of the run.

    Returns:
        A line for each set of weights.
    """
    options = {AVERAGE: '--model-ema', TEACHER: '--multimix-teacher ema'}
    lines = []
    for who in (AVERAGE, TEACHER):
        what = f'{_DESCRIPTIONS[who]} ({before.get(who)})'
        if who in before and who not in now:
            lines.append(f'{what} in it are not continued: add {options[who]} to keep them.')
        elif who in before and before[who] != now[who]:
            begins = 'begin anew, as the trained weights' if now[who] == _ENTRIES[TEACHER] else (
                'are from here on the average of --model-ema')
            lines.append(f'{what} in it are kept as {now[who]} in this run, for its decays are others: they {begins}.')
    return lines
