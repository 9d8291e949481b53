"""Validation of all the weights that a run keeps, and which of them are the ones to ship."""
import logging
from typing import NamedTuple

from timm import utils
from torch import nn

from .loop import validate
from .run import Run

_logger = logging.getLogger(__name__)

TEACHER, STUDENT = 'teacher_', 'student_'


class Validated(NamedTuple):
    """What a validation found.

    Attributes:
        metrics: Metrics of the model, and with the prefix 'teacher_' those of its teacher.
        metric: The one that makes a checkpoint the best.
        metric_of: Entry of the checkpoint whose weights it is of.
    """
    metrics: dict[str, float]
    metric: float
    metric_of: str


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
        What was found: of the average instead of the weights, as in timm, unless the average is the teacher. None
        without a validation split.
    """
    if run.loaders.evaluation is None:
        return None
    task = run.task
    teacher = task.get_eval_teacher() if hasattr(task, 'get_eval_teacher') else None
    average = task.get_trainable_module(ema=True)
    teacher_is_average = teacher is not None and average is not None and teacher is average.module
    metrics, entry = validate(run, task.get_eval_model()), 'state_dict'
    if average is not None and not teacher_is_average and not run.args.model_ema_force_cpu:
        share_batch_norm(run, average)
        _logger.info(f'Without averaging the weights: {shown(metrics)}')
        metrics, entry = validate(run, task.get_eval_model(ema=True)), 'state_dict_ema'
    entries = {STUDENT: entry}
    if teacher is not None:
        share_batch_norm(run, teacher)
        metrics |= {TEACHER + name: value for name, value in validate(run, teacher).items()}
        entries[TEACHER] = 'state_dict_ema' if teacher_is_average else 'state_dict_teacher'
    return Validated(metrics, *_choose(run, metrics, entries))


def _choose(run: Run, metrics: dict[str, float], entries: dict[str, str]) -> tuple[float, str]:
    """The metric that counts, and the checkpoint's entry that it is of."""
    name = run.eval_metric.removeprefix(STUDENT).removeprefix(TEACHER)
    values = {STUDENT: metrics[name], TEACHER: metrics.get(TEACHER + name)}
    allowed = [who for who in entries if run.eval_metric == name or run.eval_metric.startswith(who)]
    best = (min if run.decreasing else max)(allowed, key=values.__getitem__)  # the model itself if they are equal
    return values[best], entries[best]


def entry_to_validate(run: Run, checkpoint: dict) -> str:
    """Which weights of a checkpoint --validate is about: those that --eval-metric names, else those of its metric."""
    keys = ['state_dict', 'model']
    if run.args.model_ema and not run.args.model_ema_force_cpu:
        keys.insert(0, 'state_dict_ema')
    if run.args.eval_metric.startswith(TEACHER):
        keys = ['state_dict_teacher', 'state_dict_ema', *keys]
    elif not run.args.eval_metric.startswith(STUDENT):
        keys.insert(0, checkpoint.get('metric_of'))
    return next(key for key in keys if key in checkpoint)
