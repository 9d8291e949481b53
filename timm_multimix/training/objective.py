"""Create the training task of a run: a timm task, or the MultiMix task that replaces it."""
import argparse
import logging
from contextlib import suppress
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from ..build.criteria import check_num_classes, criterion_options
from ..common.errors import UsageError, usage_errors
from ..options import describe_batches, errors_name_options, multimix_kwargs
from ..task import MultiLabelMultiMixTask, MultiMixTask
from ..teacher import PretrainedTeacher

_logger = logging.getLogger(__name__)


def _distillation_task(args: argparse.Namespace, model: nn.Module, **shared: Any) -> TrainingTask:
    shared.update(
        student_model=model,
        teacher_model=args.kd_model_name,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    if args.kd_distill_type == 'logit':
        return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **shared)
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim, **shared)
    return TokenDistillationTask(
        distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **shared)


def build_task(
        args: argparse.Namespace,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype | None,
) -> TrainingTask:
    """Create the training task, which computes the loss of a batch.

    Raises:
        UsageError: if the loss, teacher or MultiMix options are invalid, or do not fit the model.
    """
    shared = dict(criterion_kwargs=criterion_options(args), device=device, dtype=dtype, verbose=False)
    if args.kd_model_name:
        with usage_errors(f'--kd-model-name {args.kd_model_name}'):
            task = _distillation_task(args, model, **shared)
            check_num_classes(task.criterion, args.num_classes)
            return task
    multi_label = args.task == 'multilabel'
    if multi_label:
        shared['threshold'] = args.multilabel_threshold
    # With MultiMix, build the plain task first, so that an error names either --loss or --multimix.
    with usage_errors(f'--loss {args.loss or "(default)"}'):
        task = (MultiLabelClassificationTask if multi_label else ClassificationTask)(model, **shared)
        check_num_classes(task.criterion, args.num_classes)
    if args.multimix == 'off':
        return task
    with usage_errors(f'--multimix {args.multimix}'):
        return _multimix_task(MultiLabelMultiMixTask if multi_label else MultiMixTask, model, shared, args)


def _pretrained_teacher(model: nn.Module, shared: dict, args: argparse.Namespace) -> PretrainedTeacher:
    data_config = resolve_data_config(vars(args), model=model)
    teacher = PretrainedTeacher(
        args.multimix_teacher,
        model,
        path=args.multimix_teacher_path,
        mean=data_config['mean'],
        std=data_config['std'],
        device=shared['device'],
        dtype=shared['dtype'],
    )
    channels, *size = data_config['input_size']
    for height, width in {tuple(size), *((side, side) for side in args.train_img_sizes or ())}:
        teacher(torch.zeros(1, channels, height, width, device=shared['device'], dtype=shared['dtype']))
    return teacher


def _multimix_task(
        task_cls: type[MultiMixTask], model: nn.Module, shared: dict, args: argparse.Namespace) -> MultiMixTask:
    options = multimix_kwargs(args)
    if args.multimix_teacher not in ('none', 'ema'):
        path = f', --multimix-teacher-path {args.multimix_teacher_path}' if args.multimix_teacher_path else ''
        with usage_errors(f'--multimix-teacher {args.multimix_teacher}{path}'):
            options.update(teacher=_pretrained_teacher(model, shared, args), teacher_path=None)
    _logger.info(describe_batches(args))
    try:
        with errors_name_options():
            return task_cls(model, **shared, **options)
    except ValueError as error:
        if args.multimix == 'dense' and 'use --multimix pooled' not in str(error):
            with suppress(ValueError, TypeError):
                task_cls(model, **shared, **{**options, 'mode': 'pooled'})
                raise UsageError(f'--multimix dense: {error} (--multimix pooled supports this model.)') from error
        raise
