"""Validate all weight sets of a run. One of them selects the best checkpoint."""
from typing import NamedTuple

from timm import utils
from torch import nn

from ..build.saved_weights import AVERAGE, STUDENT, TEACHER, selecting_weights
from .loop import validate
from .setup import Setup
from .state import RunState


class Validated(NamedTuple):
    """Result of a validation.

    Attributes:
        metrics: Metrics for the summary. One weight set has no prefix: the EMA weights if there are any and no teacher,
            as in timm, otherwise the trained weights. The others have the prefixes 'student_', 'ema_' and 'teacher_'.
        metric: Metric that selects the best checkpoint.
        by_entry: Metrics of each validated weight set, by checkpoint entry.
    """
    metrics: dict[str, float]
    metric: float
    by_entry: dict[str, dict[str, float]]


def shown(metrics: dict[str, float]) -> str:
    """Format metrics for log lines."""
    return '  '.join(f'{name} {value:.4g}' for name, value in metrics.items())


def share_batch_norm(setup: Setup, model: nn.Module) -> None:
    """Synchronize BatchNorm statistics between processes, as selected by --dist-bn."""
    if setup.args.distributed and setup.args.dist_bn:
        utils.distribute_bn(model, setup.args.world_size, setup.args.dist_bn == 'reduce')


def validate_epoch(setup: Setup, state: RunState) -> Validated | None:
    """Validate the trained weights and, if present, the EMA and teacher weights.

    Returns:
        Result of the validation, None without a validation split.
    """
    if setup.loaders.evaluation is None:
        return None
    task = setup.task
    teacher = task.get_eval_teacher() if hasattr(task, 'get_eval_teacher') else None
    average = task.get_trainable_module(ema=True)
    is_shared = teacher is not None and average is not None and teacher is average.module
    found = {STUDENT: validate(setup, state, task.get_eval_model())}
    if average is not None and not is_shared and not setup.args.model_ema_force_cpu:
        share_batch_norm(setup, average)
        found[AVERAGE] = validate(setup, state, task.get_eval_model(ema=True))
    if teacher is not None:
        share_batch_norm(setup, teacher)
        found[TEACHER] = validate(setup, state, teacher)
    selecting = selecting_weights(setup.args)
    metrics = found[TEACHER if is_shared and selecting == AVERAGE else selecting]
    places = {STUDENT: 'state_dict', AVERAGE: 'state_dict_ema',
              TEACHER: 'state_dict_ema' if is_shared else 'state_dict_teacher'}
    by_entry = {places[name]: {key: float(value) for key, value in metrics.items()} for name, metrics in found.items()}
    return Validated(_columns(found), metrics[setup.eval_metric], by_entry)


def _columns(found: dict[str, dict[str, float]]) -> dict[str, float]:
    without_prefix = AVERAGE if AVERAGE in found and TEACHER not in found else STUDENT
    names = sorted(found, key=lambda weight_set: weight_set != without_prefix)
    prefixes = {name: '' if name == without_prefix else f'{name}_' for name in names}
    return {prefixes[name] + metric: value for name in names for metric, value in found[name].items()}
