"""Checks of the options before data are read and the model is built."""
import argparse
import logging
import math
import os
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.optim import list_optimizers
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from timm.utils.distributed import world_info_from_env

from ..build.arguments import DEFAULT_OUTPUT
from ..build.hub_files import is_hub_name
from ..build.loaders import mixup_active
from ..build.model import check_model_name
from ..build.option import option_name
from ..build.saved_weights import validated_weights
from ..common.command_line import check_dataset_packages, check_packages
from ..common.errors import UsageError, near_names, usage_errors
from ..common.files import check_output
from ..data.dataset_types import DATASET_TYPES, NEED_FOLDER, check_split, dataset_prefix
from ..data.demo import DEMOS
from ..options import check_multimix
from .checkpoints import holds_checkpoints

_logger = logging.getLogger(__name__)

_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
# Allowed values of options that are free text in timm's parser and that timm does not check before training.
_CHOICES = {
    'amp_dtype': ('float16', 'bfloat16'),
    'model_dtype': ('float32', 'float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'remode': ('pixel', 'rand', 'const'),
    'train_crop_mode': ('rrc', 'rkrc', 'rkrr'),
    'worker_seeding': ('all', 'part'),
    'dist_bn': ('', 'broadcast', 'reduce'),
    'interpolation': ('', *_INTERPOLATIONS, 'random'),
    'train_interpolation': ('', *_INTERPOLATIONS, 'random'),
    'lr_decay_fn': ('linear', '1-sqrt', 'cosine', 'power', 'exp'),
}
# Names for suggestions in error messages. timm validates the values.
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly', 'wsd', 'rsqrt', 'constant', 'none')
_AUGMENTATIONS = ('v0', 'v0r', 'original', 'originalr', '3a', 'rand', 'augmix')
# Checks of a number, their description, and the options that they apply to. In a list every number is checked.
_RANGES = (
    (lambda value: value >= 1, 'at least 1', (
        'batch_size', 'validation_batch_size', 'epochs', 'img_size', 'in_chans', 'grad_accum_steps', 'log_interval',
        'val_interval', 'checkpoint_hist', 'stop_epoch', 'save_epochs', 'dist_timeout')),
    (lambda value: value >= 0, '0 or more', (
        'workers', 'max_nonfinite', 'recovery_interval', 'lr', 'lr_base', 'mixup', 'cutmix', 'clip_grad',
        'warmup_epochs', 'cooldown_epochs', 'start_epoch')),
    (lambda value: value > 0, 'above 0', ('std', 'crop_pct', 'scale', 'ratio', 'decay_epochs')),
    (lambda value: 0 <= value < 2 ** 32, 'between 0 and 4294967295', ('seed',)),  # NumPy's seeds
    (lambda value: 0 <= value <= 1, 'between 0 and 1', (
        'hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'mixup_prob',
        'mixup_switch_prob', 'model_ema_decay')),
    (lambda value: 0 <= value < 1, '0 or more and below 1', (
        'smoothing', 'drop', 'drop_connect', 'drop_path', 'drop_block')),
    (lambda value: 0 < value < 1, 'above 0 and below 1', ('multilabel_threshold',)),
)
_MAY_BE_INFINITE = ('clip_grad', 'loss_weight_max')  # infinity means no limit
_EXCLUSIVE = (
    ('split_bn', 'sync_bn'), ('torchscript', 'torchcompile'), ('torchscript', 'sync_bn'),
    ('naflex_loader', 'train_img_sizes'), ('naflex_loader', 'use_multi_epochs_loader'), ('naflex_loader', 'aug_splits'),
    ('calibrate', 'naflex_loader'), ('calibrate', 'torchscript'))


def _check_values(args: argparse.Namespace) -> None:
    for name, choices in _CHOICES.items():
        value = getattr(args, name)
        if value is not None and value not in choices:
            listed = ', '.join(choice or "''" for choice in choices)
            raise UsageError(f'{option_name(name)} must be one of {listed}, got {value!r}.{near_names(value, choices)}')
    for name, value in vars(args).items():
        numbers = [number for number in _as_list(value) if isinstance(number, float)]
        if any(math.isnan(number) or (math.isinf(number) and name not in _MAY_BE_INFINITE) for number in numbers):
            raise UsageError(f'{option_name(name)} must be a finite number, got {value}.')
    for is_valid, description, names in _RANGES:
        for name in names:
            value = getattr(args, name)
            if value is not None and not all(map(is_valid, _as_list(value))):
                raise UsageError(f'{option_name(name)} must be {description}, got {value}.')
    for name in ('cutmix_minmax', 'scale', 'ratio'):
        value = getattr(args, name)
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            raise UsageError(f'{option_name(name)} takes a lowest and a highest value, got {value}.')
    if args.opt_betas is not None and len(args.opt_betas) < 2:
        raise UsageError(f'--opt-betas takes at least two numbers, got {args.opt_betas}.')


def _as_list(value: Any) -> list | tuple:
    return value if isinstance(value, (list, tuple)) else [value]


def _check_optimizer(args: argparse.Namespace) -> None:
    name = args.opt.lower().removeprefix('lookahead_')
    if name not in list_optimizers():
        raise UsageError(f'--opt {args.opt}: timm has no such optimizer.{near_names(name, list_optimizers())}')


def _check_schedule(args: argparse.Namespace) -> None:
    """Build the schedule for a single parameter, so that timm validates its options."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with usage_errors(f'--sched {args.sched}', near_names(args.sched, _SCHEDULES)):
        create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1000)


def _check_augmentation(args: argparse.Namespace) -> None:
    """Build the transform, so that timm validates the policy."""
    if args.aa:
        with usage_errors(f'--aa {args.aa}', near_names(args.aa.partition('-')[0], _AUGMENTATIONS)):
            create_transform(224, is_training=True, auto_augment=args.aa)


def _check_dataset(args: argparse.Namespace) -> None:
    prefix = dataset_prefix(args.dataset)
    if prefix == 'demo':
        if args.dataset.lower() not in DEMOS:
            raise UsageError(
                f'--dataset {args.dataset}: the embedded datasets are {", ".join(DEMOS)}.'
                f'{near_names(args.dataset.lower(), DEMOS)}')
        if args.data_dir:
            raise UsageError(
                f'--data-dir {args.data_dir} and --dataset {args.dataset} are two datasets. To train on the folder, '
                "add --dataset ''.")
    elif prefix in DATASET_TYPES:
        check_dataset_packages('--dataset', args.dataset)
        if prefix in NEED_FOLDER and not args.data_dir:
            raise UsageError(f'--dataset {args.dataset} is read from a folder: give --data-dir too.')
    else:
        types = (*DATASET_TYPES, 'demo')
        misspelt = near_names(prefix, types)
        if misspelt or not args.data_dir:
            hint = misspelt or near_names(args.dataset.lower(), DEMOS)
            raise UsageError(
                f'--dataset {args.dataset}: unknown type of dataset. Give only --data-dir for a folder of images, or '
                f'one of {"/..., ".join(types)}/....{hint}')
        if not os.path.exists(args.data_dir):
            raise UsageError(f'--data-dir {args.data_dir}: no such folder.')
    for option, split in (('--train-split', args.train_split), ('--val-split', args.val_split)):
        if split:
            with usage_errors(f'{option} {split}'):
                check_split(args.dataset, args.data_dir, split)


def _check_files(args: argparse.Namespace) -> None:
    for name in ('initial_checkpoint', 'pretrained_path', 'resume', 'validate', 'class_stats',
                 'multimix_teacher_path'):
        path = getattr(args, name)
        if name in ('initial_checkpoint', 'resume') and is_hub_name(path):
            continue
        if path and not (name == 'resume' and path == 'auto') and not os.path.isfile(path):
            wrong = ' is a folder: give a file.' if os.path.isdir(path) else ': no such file.'
            raise UsageError(f'{option_name(name)} {path}{wrong}')
    if args.resume == 'auto' and not args.experiment:
        raise UsageError('--resume auto needs --experiment, the name of the run to continue.')
    if args.wandb_resume_id and not args.resume:
        raise UsageError('--wandb-resume-id needs --resume.')
    if not args.validate and world_info_from_env()[1] == 0:
        check_output(os.path.join(args.output or DEFAULT_OUTPUT, args.experiment))
    check_run_folder(args)


def check_run_folder(args: argparse.Namespace) -> None:
    """Check that the run folder is inside --output and contains no checkpoints that the run does not continue."""
    if os.path.isabs(args.experiment) or '..' in args.experiment.replace('\\', '/').split('/'):
        raise UsageError(
            f'--experiment {args.experiment} is outside of the output folder: give a folder name, or change --output.')
    if not args.experiment or args.validate or args.resume == 'auto':
        return
    folder = os.path.join(args.output or DEFAULT_OUTPUT, args.experiment)
    continues = args.resume and os.path.realpath(os.path.dirname(args.resume)) == os.path.realpath(folder)
    if not continues and holds_checkpoints(folder):
        raise UsageError(
            f'--experiment {args.experiment}: {folder} contains a run. Continue it with --resume auto, or choose '
            'another name.')


def _check_combinations(args: argparse.Namespace) -> None:
    for first, second in _EXCLUSIVE:
        if getattr(args, first) and getattr(args, second):
            raise UsageError(f'{option_name(first)} and {option_name(second)} cannot be combined.')
    rules = (
        (args.aug_splits == 1 or args.aug_splits < 0, '--aug-splits must be 0, or 2 or more.'),
        (args.loss == 'jsd' and args.aug_splits < 2, '--loss jsd needs --aug-splits 2 or more.'),
        (args.split_bn and args.aug_splits < 2 and not args.resplit, '--split-bn needs --aug-splits.'),
        (mixup_active(args) and any(size % 2 for size in (args.batch_size, *(args.train_batch_sizes or ()))),
         'mixup and CutMix need an even --batch-size.'),
        (args.aug_splits and mixup_active(args), '--aug-splits and mixup or CutMix cannot be combined.'),
        (args.aug_splits and args.no_prefetcher, '--aug-splits needs the prefetcher.'),
        (args.amp and args.model_dtype not in (None, 'float32'), '--amp needs a float32 model: omit --model-dtype.'),
        (args.task == 'multilabel' and args.kd_model_name, '--task multilabel does not support distillation.'),
        (args.task == 'multilabel' and not args.num_classes, '--task multilabel needs --num-classes.'),
        (args.target_format == 'multihot' and not dataset_prefix(args.dataset) and os.path.isdir(args.data_dir or ''),
         '--target-format multihot: an image folder has one class for each image. Choose --task classification, or a '
         'dataset with lists of labels as targets.'),
        (args.task == 'classification' and args.target_format != 'indices',
         '--target-format multihot is for --task multilabel.'),
        (args.task == 'classification' and ',' in (args.target_key or ''),
         '--target-key with several fields is for --task multilabel.'),
        (args.calibrate is not None and args.task != 'classification',
         '--calibrate is for --task classification: it fits a temperature to one class per image.'),
        (args.validate and not args.val_split, '--validate needs a --val-split.'),
        (args.hub_model_id and not args.push_to_hub, '--hub-model-id needs --push-to-hub.'),
    )
    for is_wrong, message in rules:
        if is_wrong:
            raise UsageError(message)


def _check_eval_metric(args: argparse.Namespace) -> None:
    evaluator = MultiLabelClassificationEvaluator if args.task == 'multilabel' else ClassificationEvaluator
    names, weights = evaluator.metric_names, validated_weights(args)
    if args.val_split and args.eval_metric not in names:
        raise UsageError(
            f'--eval-metric must be one of {", ".join(names)}, got {args.eval_metric}.'
            f'{near_names(args.eval_metric, names)}')
    if args.eval_weights and not args.val_split:
        raise UsageError('--eval-weights needs a --val-split: without validation no weights are compared.')
    if args.val_split and not args.validate and args.eval_weights not in (None, *weights):
        raise UsageError(
            f'--eval-weights must be one of {", ".join(weights)}, the weights that this run validates, got '
            f'{args.eval_weights}.')


def check_args(args: argparse.Namespace) -> None:
    """Raise UsageError for the first invalid option, without reading data or building a model."""
    _check_values(args)
    check_model_name(args.model, '--model')
    if args.kd_model_name:
        check_model_name(args.kd_model_name, '--kd-model-name')
    if args.input_img_mode:
        with usage_errors(f'--input-img-mode {args.input_img_mode}', near_names(args.input_img_mode, Image.MODES)):
            Image.new(args.input_img_mode, (1, 1))
    _check_optimizer(args)
    _check_schedule(args)
    _check_augmentation(args)
    for name in args.report_to:
        check_packages(f'--report-to {name}', [name])
    _check_dataset(args)
    _check_files(args)
    _check_combinations(args)
    _check_eval_metric(args)
    check_multimix(args)
