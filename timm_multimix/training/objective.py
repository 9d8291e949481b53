"""Create the training task of a run: a task of timm, or the MultiMix task that replaces it."""
import argparse
import logging
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from ..build.checkpoint import check_weights_file
from ..build.criteria import check_num_classes, criterion_options
from ..build.model import blank_images, model_dtype
from ..common.errors import usage_errors
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
    return TokenDistillationTask(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **shared)


def build_task(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any]) -> TrainingTask:
    """Create the training task, which computes the loss of a batch.

    Raises:
        UsageError: if the loss, teacher or MultiMix options are invalid, or do not fit the model.
    """
    shared = dict(
        criterion_kwargs=criterion_options(args), device=torch.device(args.device), dtype=model_dtype(args),
        verbose=False)
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
        options = multimix_kwargs(args)
        if args.multimix_teacher not in ('none', 'ema'):
            options.update(teacher=_pretrained_teacher(args, model, data_config), teacher_path=None)
        _logger.info(describe_batches(args))
        with errors_name_options():
            return (MultiLabelMultiMixTask if multi_label else MultiMixTask)(model, **shared, **options)


def _pretrained_teacher(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any]) -> PretrainedTeacher:
    """Create the teacher of --multimix-teacher, and run it on an image of each size to check that it accepts them."""
    path = args.multimix_teacher_path
    with usage_errors(
            f'--multimix-teacher {args.multimix_teacher}' + (f', --multimix-teacher-path {path}' if path else '')):
        check_weights_file(path or '')
        teacher = PretrainedTeacher(
            args.multimix_teacher, model, path=path, mean=data_config['mean'], std=data_config['std'],
            device=torch.device(args.device), dtype=model_dtype(args))
        for images in blank_images(args, model, data_config):
            teacher(images)
    return teacher
