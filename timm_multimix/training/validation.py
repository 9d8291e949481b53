"""Validate the weight sets of a run, or of a checkpoint."""
import logging
from typing import Any

import torch
from timm import utils
from timm.models import clean_state_dict
from timm.task import evaluation_sample_limit
from torch import nn

from ..build.checkpoint import read_checkpoint
from ..build.loaders import VALIDATION
from ..build.saved_weights import (
    AVERAGE,
    STUDENT,
    TEACHER,
    described,
    saved_weights,
    selecting_weights,
    weights_entry,
)
from ..common.errors import UsageError, usage_errors
from .loop import read_batches, shown, to_device
from .resuming import check_architecture
from .run import compile_task
from .setup import Setup
from .state import RunState

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def _validate(state: RunState, model: nn.Module) -> dict[str, float]:
    """Return the metrics of an evaluation model of the task over the validation set, reduced over all processes."""
    setup, args, loader = state.setup, state.setup.args, state.setup.loaders.evaluation
    evaluator = setup.task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    model.eval()
    state.validated = True
    for index, (input, target) in enumerate(read_batches(loader)):
        state.watchdog.move(f'validation, batch {index}')
        input, target = to_device(setup, input, target)
        with setup.autocast():
            output = model(input)
        output = output[0] if isinstance(output, (tuple, list)) else output
        if args.tta > 1:
            output = output.unfold(0, args.tta, args.tta).mean(dim=2)
            target = target[::args.tta]
        evaluator.update(output, target)
        state.stop.check()
    return {name: float(value) for name, value in evaluator.compute(distributed=args.distributed).items()}


def share_batch_norm(setup: Setup, model: nn.Module) -> None:
    """Synchronize BatchNorm statistics between processes, as selected by --dist-bn."""
    if setup.args.distributed and setup.args.dist_bn:
        utils.distribute_bn(model, setup.args.world_size, setup.args.dist_bn == 'reduce')


def validate_epoch(state: RunState) -> tuple[dict[str, float], float | None, dict[str, Any]]:
    """Validate the trained weights and, if present, the EMA and teacher weights.

    Returns:
        Metrics for the summary, the metric that selects the best checkpoint, and entries of the checkpoint; empty
        without a validation split. One weight set has metrics without prefix: the EMA weights if there are any and no
        teacher, as in timm, otherwise the trained weights. The others have the prefixes 'student_', 'ema_', 'teacher_'.
    """
    setup, task = state.setup, state.setup.task
    if setup.loaders.evaluation is None:
        return {}, None, {}
    teacher = task.get_eval_teacher() if hasattr(task, 'get_eval_teacher') else None
    average = task.get_trainable_module(ema=True)
    is_shared = teacher is not None and average is not None and teacher is average.module
    found = {STUDENT: _validate(state, task.get_eval_model())}
    if average is not None and not is_shared and not setup.args.model_ema_force_cpu:
        share_batch_norm(setup, average)
        found[AVERAGE] = _validate(state, task.get_eval_model(ema=True))
    if teacher is not None:
        share_batch_norm(setup, teacher)
        found[TEACHER] = _validate(state, teacher)
    without_prefix = AVERAGE if AVERAGE in found and TEACHER not in found else STUDENT
    columns = dict(found[without_prefix])
    for name in (name for name in found if name != without_prefix):
        columns.update((f'{name}_{metric}', value) for metric, value in found[name].items())
    setup.loaders.warn_of_unreadable(VALIDATION, f'Epoch {state.epoch}: ')
    _logger.info(f'Epoch {state.epoch}: validation  {shown(columns)}')
    selecting = selecting_weights(setup.args)
    metrics = found[TEACHER if is_shared and selecting == AVERAGE else selecting]
    places = {STUDENT: 'state_dict', AVERAGE: 'state_dict_ema',
              TEACHER: 'state_dict_ema' if is_shared else 'state_dict_teacher'}
    entries = dict(eval_weights=selecting, metrics={places[name]: values for name, values in found.items()})
    return columns, metrics[setup.eval_metric], entries


def validate_checkpoint(state: RunState) -> None:
    """Validate the checkpoint given by --validate and log its metrics."""
    setup, args, task, path = state.setup, state.setup.args, state.setup.task, state.setup.args.validate
    checkpoint = read_checkpoint(path)
    key = weights_entry(checkpoint, args.eval_weights or 'best')
    if key is None:
        raise UsageError(
            f'--eval-weights {args.eval_weights}: {path} contains only the weights '
            f'{", ".join(saved_weights(checkpoint))}.')
    with usage_errors(f'{path} does not fit --model {args.model}'):
        try:
            task.load_checkpoint_state(clean_state_dict(checkpoint[key]))
        except RuntimeError:
            check_architecture(args, checkpoint, path)
            raise
    compile_task(args, task)
    metrics = _validate(state, task.get_eval_model())
    setup.loaders.warn_of_unreadable(VALIDATION)
    _logger.info(f'{path}: {shown(metrics)} ({described(checkpoint, key)})')
