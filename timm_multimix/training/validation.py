"""Validation of all the weights that a run keeps, and which of them are the ones to ship."""
import logging
import math
from typing import NamedTuple

from timm import utils
from torch import nn

from .loop import validate
from .run import Run
from .saved_weights import AVERAGE, STUDENT, TEACHER, saved_weights, split_metric, weights_of_metric

_logger = logging.getLogger(__name__)


class Validated(NamedTuple):
    """What a validation found.

    Attributes:
        metrics: For the summary: metrics of the trained weights, as in timm of their average where there is one; and
            with a teacher those of all, the others with the prefixes 'ema_' and 'teacher_'.
        metric: The one that makes a checkpoint the best.
        metric_of: Entry of the checkpoint whose weights it is of.
        by_entry: Metrics of all weights that were validated, by their entry of the checkpoint.
    """
    metrics: dict[str, float]
    metric: float
    metric_of: str
    by_entry: dict[str, dict[str, float]]


def shown(metrics: dict[str, float]) -> str:
    """Metrics as text."""
    return '  '.join(f'{name} {value:.4g}' for name, value in metrics.items())


def share_batch_norm(run: Run, model: nn.Module) -> None:
    """Give all processes the same statistics, as --dist-bn says."""
    if run.args.distributed and run.args.dist_bn:
        utils.distribute_bn(model, run.args.world_size, run.args.dist_bn == 'reduce')


def validate_epoch(run: Run) -> Validated | None:
    """Validate the weights, their average and the teacher, those that there are.

    Returns:
        What was found; None without a validation split.
    """
    if run.loaders.evaluation is None:
        return None
    task = run.task
    teacher = task.get_eval_teacher() if hasattr(task, 'get_eval_teacher') else None
    average = task.get_trainable_module(ema=True)
    shared = teacher is not None and average is not None and teacher is average.module
    found = {STUDENT: validate(run, task.get_eval_model())}
    if average is not None and not shared and not run.args.model_ema_force_cpu:
        share_batch_norm(run, average)
        found[AVERAGE] = validate(run, task.get_eval_model(ema=True))
    if teacher is not None:
        share_batch_norm(run, teacher)
        found[TEACHER] = validate(run, teacher)
    elif AVERAGE in found:
        _logger.info(f'Without averaging the weights: {shown(found[STUDENT])}')
    who, metric = _choose(run, found)
    places = {STUDENT: 'state_dict', AVERAGE: 'state_dict_ema',
              TEACHER: 'state_dict_ema' if shared else 'state_dict_teacher'}
    by_entry = {places[name]: {key: float(value) for key, value in metrics.items()} for name, metrics in found.items()}
    return Validated(_columns(found), metric, places[who], by_entry)


def _columns(found: dict[str, dict[str, float]]) -> dict[str, float]:
    if TEACHER not in found:
        return found.get(AVERAGE, found[STUDENT])
    prefixes = {who: '' if who == STUDENT else f'{who}_' for who in found}
    return {prefixes[who] + name: value for who, metrics in found.items() for name, value in metrics.items()}


def _choose(run: Run, found: dict[str, dict[str, float]]) -> tuple[str, float]:
    """Whose metric counts, and that metric: the best where --eval-metric names nobody."""
    who, name = split_metric(run.eval_metric)
    if who == AVERAGE and AVERAGE not in found:  # the teacher is the average
        who = TEACHER
    candidates = [who] if who else [AVERAGE] if AVERAGE in found and TEACHER not in found else list(found)
    candidates = [who for who in candidates if not math.isnan(found[who][name])] or candidates
    best = (min if run.decreasing else max)(candidates, key=lambda who: found[who][name])  # the first of equal ones
    return best, found[best][name]


def entry_to_validate(run: Run, checkpoint: dict) -> str:
    """Which weights of a checkpoint --validate is about: those that --eval-metric names, else those of its metric."""
    saved = saved_weights(checkpoint)
    who, _ = split_metric(run.args.eval_metric)
    if who in saved:
        return saved[who]
    if who is None and checkpoint.get('metric_of') in checkpoint:
        return checkpoint['metric_of']
    averages = run.args.model_ema and not run.args.model_ema_force_cpu and AVERAGE in saved
    return saved.get(AVERAGE if averages else STUDENT) or weights_of_metric(checkpoint)
