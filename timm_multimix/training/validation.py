"""Validate all weight sets of a run and select the metric of its checkpoint."""
import logging
import math
from typing import NamedTuple

from timm import utils
from torch import nn

from ..build.saved_weights import AVERAGE, STUDENT, TEACHER, saved_weights, split_metric, weights_of_metric
from .loop import validate
from .run import Run

_logger = logging.getLogger(__name__)


class Validated(NamedTuple):
    """Result of a validation.

    Attributes:
        metrics: Metrics for the summary. Without a teacher these are the metrics of the EMA weights if there are any,
            as in timm, else of the trained weights. With a teacher these are the metrics of the trained weights, and of
            the other weight sets with the prefixes 'ema_' and 'teacher_'.
        metric: Metric that selects the best checkpoint.
        metric_of: Checkpoint entry of the weights that `metric` belongs to.
        by_entry: Metrics of each validated weight set, by checkpoint entry.
    """
    metrics: dict[str, float]
    metric: float
    metric_of: str
    by_entry: dict[str, dict[str, float]]


def shown(metrics: dict[str, float]) -> str:
    """Format metrics for log lines."""
    return '  '.join(f'{name} {value:.4g}' for name, value in metrics.items())


def share_batch_norm(run: Run, model: nn.Module) -> None:
    """Synchronize BatchNorm statistics between processes, as selected by --dist-bn."""
    if run.args.distributed and run.args.dist_bn:
        utils.distribute_bn(model, run.args.world_size, run.args.dist_bn == 'reduce')


def validate_epoch(run: Run) -> Validated | None:
    """Validate the trained weights and, if present, the EMA and teacher weights.

    Returns:
        Result of the validation, None without a validation split.
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
    best, metric = _select(run, found)
    places = {STUDENT: 'state_dict', AVERAGE: 'state_dict_ema',
              TEACHER: 'state_dict_ema' if shared else 'state_dict_teacher'}
    by_entry = {places[name]: {key: float(value) for key, value in metrics.items()} for name, metrics in found.items()}
    return Validated(_columns(found), metric, places[best], by_entry)


def _columns(found: dict[str, dict[str, float]]) -> dict[str, float]:
    if TEACHER not in found:
        return found.get(AVERAGE, found[STUDENT])
    prefixes = {weight_set: '' if weight_set == STUDENT else f'{weight_set}_' for weight_set in found}
    return {prefixes[key] + name: value for key, metrics in found.items() for name, value in metrics.items()}


def _select(run: Run, found: dict[str, dict[str, float]]) -> tuple[str, float]:
    """Return the weight set and value of the checkpoint metric: the best one if --eval-metric has no prefix."""
    weight_set, name = split_metric(run.eval_metric)
    if weight_set == AVERAGE and AVERAGE not in found:  # teacher and EMA share their weights
        weight_set = TEACHER
    candidates = [weight_set] if weight_set else [AVERAGE] if AVERAGE in found and TEACHER not in found else list(found)
    candidates = [key for key in candidates if not math.isnan(found[key][name])] or candidates
    best = (min if run.decreasing else max)(candidates, key=lambda key: found[key][name])  # the first of equal values
    return best, found[best][name]


def entry_to_validate(run: Run, checkpoint: dict) -> str:
    """Return the checkpoint entry to validate: the weights named by --eval-metric, else those of the metric."""
    saved = saved_weights(checkpoint)
    weight_set, _ = split_metric(run.args.eval_metric)
    if weight_set in saved:
        return saved[weight_set]
    if weight_set is None and checkpoint.get('metric_of') in checkpoint:
        return checkpoint['metric_of']
    averages = run.args.model_ema and not run.args.model_ema_force_cpu and AVERAGE in saved
    return saved.get(AVERAGE if averages else STUDENT) or weights_of_metric(checkpoint)
