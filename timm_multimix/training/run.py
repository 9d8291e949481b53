"""Build a training run from its arguments."""
import argparse
import importlib
import logging
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

import torch
from timm import utils
from timm.layers import set_fast_norm
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from torch.optim import Optimizer

from ..build.arguments import DEFAULT_OUTPUT
from ..build.classes import check_targets, match_classes, settle_classes
from ..build.datasets import build_datasets
from ..build.hub_files import WEIGHTS_NAME, download, is_hub_name
from ..build.loaders import Loaders, build_calibration_loader, build_loaders
from ..build.model import (
    check_input_sizes,
    create_run_model,
    input_channels,
    model_options,
    place_model,
    report_positions,
    resolve_data,
)
from ..build.saved_weights import changes, entries
from ..calibration.run import check_classifier, check_continues, hold_out
from ..common.distributed import Watchdog, choose_device, join_processes, of_the_first
from ..common.errors import UsageError, usage_errors
from ..common.files import lock_folder
from ..data.demo import Part
from ..options import batch_schedule
from .checkpoints import newest_checkpoint
from .interrupt import StopRequest
from .loss_guard import LossGuard
from .objective import build_task
from .progress import reading_progress, step_scheduler, usable_progress
from .resuming import load_weights, resume, setup_ema

_logger = logging.getLogger(__name__)


@dataclass
class Precision:
    """Number formats of a run.

    Attributes:
        dtype: Dtype of model and images, None for float32.
        autocast: Returns the autocast context of a forward pass.
        loss_scaler: Loss scaler for float16 autocast on CUDA, else None.
    """
    dtype: torch.dtype | None
    autocast: Callable[[], Any]
    loss_scaler: utils.NativeScaler | None


@dataclass
class Run:
    """State of a training run, created by build_run.

    Attributes:
        args: Arguments, by timm's names.
        device: Device of this process.
        precision: Number formats.
        task: timm training task. It owns the model and computes the loss.
        loaders: Training, validation and calibration loaders.
        data_config: Input size, pixel statistics, crop and interpolation.
        class_to_idx: Index of each class name, None if the class names are unknown.
        optimizer: The optimizer, None for a run that only validates.
        scheduler: Learning rate scheduler, None for --sched none.
        eval_metric: Metric that selects the best checkpoint.
        updates_per_epoch: Optimizer updates in an epoch.
        start_epoch: First epoch to train.
        num_epochs: Epochs of the schedule.
        stop_epoch: Training ends before this epoch; at most num_epochs.
        folder: Output folder.
        resumed_from: Checkpoint that the run continues from, or None.
        settled: Optimizer options that were reset to the values in the checkpoint.
        progress: Progress that belongs to the current weights, None if there is none.
        interrupted: Metric averages of an interrupted epoch to continue, None for a new epoch.
        guard: Skips updates whose loss is not finite.
        stop: Stop request of the user (SIGINT or SIGTERM).
        watchdog: Current place of this process in the run.
    """
    args: argparse.Namespace
    device: torch.device
    precision: Precision
    task: TrainingTask
    loaders: Loaders
    data_config: dict[str, Any]
    class_to_idx: dict[str, int] | None = None
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    eval_metric: str = 'loss'
    updates_per_epoch: int = 0
    start_epoch: int = 0
    num_epochs: int = 0
    stop_epoch: int = 0
    folder: str = ''
    resumed_from: str | None = None
    settled: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] | None = None
    interrupted: dict[str, Any] | None = None
    guard: LossGuard | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    watchdog: Watchdog = field(default_factory=Watchdog)

    @property
    def decreasing(self) -> bool:
        """Whether a lower metric is better."""
        return self.eval_metric.endswith('loss')


def _setup_device(args: argparse.Namespace) -> torch.device:
    for module in args.device_modules or ():
        with usage_errors('--device-modules'):
            importlib.import_module(module)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if args.fuser:
        with usage_errors(f'--fuser {args.fuser}'):
            utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    with usage_errors(f'--device {args.device}'):
        device = choose_device(args)
    if args.distributed:
        join_processes(device, args.rank, args.world_size, args.dist_timeout)
    where = f'{args.world_size} processes, this one' if args.distributed else 'one process'
    _logger.info(f'Training with {where} on {device}.')
    return device


def _setup_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    if dtype == torch.float16:
        _logger.warning('Training with --model-dtype float16 is often unstable. bfloat16 has a larger range.')
    if not args.amp:
        return Precision(dtype, nullcontext, None)
    amp_dtype = getattr(torch, args.amp_dtype)
    needs_scaler = device.type == 'cuda' and amp_dtype == torch.float16
    return Precision(
        dtype,
        partial(torch.autocast, device_type=device.type, dtype=amp_dtype),
        utils.NativeScaler(device=device.type) if needs_scaler else None,
    )


def _settle_learning_rate(args: argparse.Namespace, batch_size: float) -> None:
    """Set args.lr from --lr-base and the global batch size, unless --lr is given."""
    if args.lr:
        return
    global_batch_size = batch_size * args.world_size * args.grad_accum_steps
    if not args.lr_base_scale:
        args.lr_base_scale = 'sqrt' if any(kind in args.opt.lower() for kind in ('ada', 'lamb')) else 'linear'
    ratio = global_batch_size / args.lr_base_size
    args.lr = args.lr_base * (ratio ** 0.5 if args.lr_base_scale == 'sqrt' else ratio)
    _logger.info(
        f'Learning rate {args.lr:.4g}: --lr-base {args.lr_base} for a batch of {args.lr_base_size}, scaled '
        f'({args.lr_base_scale}) to {global_batch_size:g}.')


def _run_folder(args: argparse.Namespace, image_size: int) -> str:
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(image_size)])
    return os.path.normpath(os.path.join(args.output or DEFAULT_OUTPUT, name))


def _build_schedule(run: Run, checkpoint: dict[str, Any]) -> None:
    args = run.args
    with usage_errors(f'--sched {args.sched}'):
        run.scheduler, run.num_epochs = create_scheduler_v2(
            run.optimizer,
            **scheduler_kwargs(args, decreasing_metric=run.decreasing),
            updates_per_epoch=run.updates_per_epoch,
        )
    if args.stop_epoch is not None and args.stop_epoch > run.num_epochs:
        raise UsageError(f'--stop-epoch {args.stop_epoch} must not exceed the {run.num_epochs} epochs of the run.')
    if args.multimix != 'off' and args.multimix_start_epoch >= run.num_epochs:
        raise UsageError(
            f'--multimix-start-epoch {args.multimix_start_epoch} must be less than the {run.num_epochs} epochs of the '
            'run, which are counted from 0.')
    run.stop_epoch = args.stop_epoch or run.num_epochs
    resume_epoch = checkpoint.get('epoch') or 0
    run.start_epoch = resume_epoch if args.start_epoch is None else args.start_epoch
    with reading_progress(run) if checkpoint else nullcontext():
        if checkpoint and run.start_epoch == resume_epoch and not args.no_resume_opt:
            run.progress = usable_progress(run, checkpoint['progress'])
        step_scheduler(run, checkpoint)


def _build_training(run: Run) -> None:
    """Build the optimizer, resume, set up EMA, compile and distribute the model, and build the schedule."""
    args, task = run.args, run.task
    with usage_errors(f'--opt {args.opt}'):
        run.optimizer = create_optimizer_v2(
            task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    path = args.resume or None
    if path and utils.is_primary(args) and os.path.isdir(run.folder) and not args.dry_run:
        with usage_errors(f'--output {run.folder}'):
            lock_folder(run.folder)  # before its checkpoints are read
    if args.resume == 'auto':
        path = newest_checkpoint(run.folder) if utils.is_primary(args) else None
        if path is None and os.path.exists(os.path.join(run.folder, 'args.yaml')):
            _logger.info(f'No checkpoint in {run.folder}: the run begins again.')
    if args.distributed:
        path = of_the_first(path)
    if path and is_hub_name(path):
        with usage_errors(f'--resume {path}'):
            path = download(path, 'last.pth.tar', WEIGHTS_NAME)
    elif path and args.distributed and not os.path.isfile(path):
        raise UsageError(f'--resume {path}: not found on {socket.gethostname()}. All machines must share the folder.')
    if path and path.endswith('.safetensors'):
        load_weights(task, path, args.resume)
        path = None
    if path:
        check_continues(args, path)
    checkpoint = resume(args, task, run.optimizer, run.precision.loss_scaler, path) if path else {}
    run.resumed_from = path
    run.settled = checkpoint.get('settled', {})
    if args.distributed:
        # Each process has its own seed, and setup_ema copies the weights before DDP synchronizes them.
        for tensor in task.get_trainable_module().state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    if args.model_ema:
        setup_ema(args, task, path)
    _warn_of_changes(task, args, checkpoint)
    compile_task(args, task)
    if args.distributed:
        options = dict(broadcast_buffers=False) if args.no_ddp_bb else {}
        task.prepare_distributed(device_ids=[run.device] if run.device.type != 'cpu' else None, **options)
        run.stop.connect(args.dist_timeout)
    run.guard = LossGuard(task.get_trainable_module(), args.max_nonfinite, args.distributed)
    run.updates_per_epoch = -(-len(run.loaders.train) // args.grad_accum_steps)
    _build_schedule(run, checkpoint)


def _warn_of_changes(task: TrainingTask, args: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
    """Warn if the EMA or teacher weights of the checkpoint are not continued unchanged."""
    names = [*task.get_checkpoint_state(), *task.get_checkpoint_state(ema=True)]
    for line in changes(checkpoint.get('weights', {}), entries(names, vars(args))):
        _logger.warning(f'--resume: {line}')


def compile_task(args: argparse.Namespace, task: TrainingTask) -> None:
    """Compile the model of a task if --torchcompile is given. Call it before the model is wrapped for distribution."""
    if not args.torchcompile:
        return
    mode = f' --torchcompile-mode {args.torchcompile_mode}' if args.torchcompile_mode else ''
    with usage_errors(f'--torchcompile {args.torchcompile}{mode}'):
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)


def build_run(args: argparse.Namespace) -> Run:
    """Build a run. Nothing is written to the output folder except the lock file of a run that is continued.

    Args:
        args: Arguments, from parse_args.

    Returns:
        The run, ready to start or continue. With --validate it has no optimizer and no schedule.

    Raises:
        UsageError: if options, data, model or checkpoint are invalid.
    """
    device = _setup_device(args)
    precision = _setup_precision(args, device)
    options = model_options(args)
    train, evaluation = build_datasets(args, input_channels(options))
    check_targets(args, train)
    classes, origin = settle_classes(args, train, evaluation)
    held_out = None
    if not args.validate:
        train, held_out = hold_out(args, train, evaluation, input_channels(options))
    if classes and held_out is not None and not isinstance(held_out, Part):
        match_classes(args, held_out, args.calibrate, classes, origin)

    utils.random_seed(args.seed, args.rank)
    model = create_run_model(args, options)
    data_config = resolve_data(args, model)
    patch_size = model.get_patch_size() if hasattr(model, 'get_patch_size') else None
    model = place_model(args, model, device, precision.dtype)
    if not args.naflex_loader:
        check_input_sizes(args, model, data_config)
    check_classifier(args, model, data_config['input_size'])
    loaders = build_loaders(
        args, (train, evaluation), data_config, device, precision.dtype, patch_size, batch_schedule(args))
    if held_out is not None:
        loaders.calibration = build_calibration_loader(args, held_out, data_config, device, precision.dtype)
    _settle_learning_rate(args, loaders.batch_size)

    run = Run(args, device, precision, build_task(args, model, device, precision.dtype), loaders, data_config)
    run.eval_metric = args.eval_metric if loaders.evaluation is not None else 'loss'
    run.class_to_idx = classes
    report_positions(args, model, data_config)
    run.folder = _run_folder(args, data_config['input_size'][-1])
    if not args.validate:
        _build_training(run)
    return run
