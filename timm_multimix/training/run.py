"""Build a training run from its arguments."""
import argparse
import importlib
import logging
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm import utils
from timm.layers import set_fast_norm
from timm.models import NaFlexVit, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask

from ..build.arguments import DEFAULT_OUTPUT
from ..build.classes import check_targets, match_classes, settle_classes
from ..build.datasets import build_datasets
from ..build.hub_files import WEIGHTS_NAME, download, is_hub_name
from ..build.loaders import build_calibration_loader, build_loaders
from ..build.model import (
    check_input_sizes,
    create_run_model,
    input_channels,
    model_options,
    place_model,
    report_positions,
    resolve_data,
)
from ..calibration.run import check_classifier, check_continues, hold_out
from ..common.distributed import choose_device, join_processes, of_the_first
from ..common.errors import UsageError, usage_errors
from ..common.files import lock_folder
from ..data.demo import Part, default_img_mode
from ..options import batch_schedule
from .checkpoints import newest_checkpoint
from .config import COMMAND_LINE_ONLY, falls_back_to_cpu
from .objective import build_task
from .resuming import load_weights, resume, set_start, setup_ema
from .setup import Setup
from .state import RunState

_logger = logging.getLogger(__name__)


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
    if falls_back_to_cpu(args):
        args.device = 'cpu'
        _logger.info('No CUDA device: training on the CPU.')
    with usage_errors(f'--device {args.device}'):
        device = choose_device(args)
        torch.zeros((), device=device).item()  # fails on a device without data, such as meta
    if args.distributed:
        join_processes(device, args.rank, args.world_size, args.dist_timeout)
    where = f'{args.world_size} processes, this one' if args.distributed else 'one process'
    _logger.info(f'Training with {where} on {device}.')
    return device


def _setup_precision(
        args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], Any], utils.NativeScaler | None]:
    """Return a function that returns the autocast context, and the loss scaler if it is needed."""
    if args.model_dtype == 'float16':
        _logger.warning('Training with --model-dtype float16 is often unstable. bfloat16 has a larger range.')
    if not args.amp:
        return nullcontext, None
    amp_dtype = getattr(torch, args.amp_dtype)
    needs_scaler = device.type == 'cuda' and amp_dtype == torch.float16
    autocast = partial(torch.autocast, device_type=device.type, dtype=amp_dtype)
    return autocast, utils.NativeScaler(device=device.type) if needs_scaler else None


def _check_channels(args: argparse.Namespace, in_chans: int) -> None:
    mode = args.input_img_mode or default_img_mode(in_chans)
    bands = Image.getmodebands(mode)
    if bands != in_chans:
        raise UsageError(
            f'--in-chans: the model has {in_chans} input channels, but images of mode {mode} have {bands}. Use 1 or 3 '
            'channels, or another --input-img-mode.')


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


def _run_folder(args: argparse.Namespace, image_size: int = 0) -> str:
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(image_size)])
    return os.path.normpath(os.path.join(args.output or DEFAULT_OUTPUT, name))


def _build_setup(args: argparse.Namespace, options: dict[str, Any], device: torch.device, resume_path: str) -> Setup:
    """Build data, model and task."""
    autocast, loss_scaler = _setup_precision(args, device)
    model_args = model_options(args)
    in_chans = input_channels(model_args)
    _check_channels(args, in_chans)
    train, evaluation = build_datasets(args, in_chans)
    check_targets(args, train)
    resume_path = args.resume if is_hub_name(args.resume) else resume_path  # class names on the Hub are in config.json
    classes, origin = settle_classes(args, train, evaluation, args.validate or resume_path or args.initial_checkpoint)
    held_out = None
    if not args.validate:
        train, held_out = hold_out(args, train, evaluation, in_chans)
    if classes and held_out is not None and not isinstance(held_out, Part):
        match_classes(args, held_out, args.calibrate, classes, origin)

    utils.random_seed(args.seed, args.rank)
    model = create_run_model(args, model_args)
    if args.naflex_loader and not isinstance(model, NaFlexVit):
        raise UsageError(
            f'--naflex-loader needs a model for patch sequences, such as naflexvit_base_patch16_gap, got {args.model}.')
    data_config = resolve_data(args, model)
    patch_size = model.get_patch_size() if hasattr(model, 'get_patch_size') else None
    model = place_model(args, model)
    if not args.naflex_loader:
        check_input_sizes(args, model, data_config)
    check_classifier(args, model, data_config['input_size'])
    loaders = build_loaders(args, (train, evaluation), data_config, patch_size, batch_schedule(args))
    if held_out is not None:
        loaders = replace(loaders, calibration=build_calibration_loader(args, held_out, data_config))
    _settle_learning_rate(args, loaders.batch_size)
    task = build_task(args, model, data_config)
    report_positions(args, model, data_config)
    return Setup(
        args, options, device, autocast, loss_scaler, task, loaders, data_config, classes,
        eval_metric=args.eval_metric if evaluation is not None else 'loss',
        folder=_run_folder(args, data_config['input_size'][-1]))


def _checkpoint_to_resume(args: argparse.Namespace) -> str:
    """Return the path that --resume selects, '' for none, the same in all processes. Lock the folder of the run."""
    path, folder = args.resume, _run_folder(args)
    if path and utils.is_primary(args) and os.path.isdir(folder) and not args.dry_run:
        with usage_errors(f'--output {folder}'):
            lock_folder(folder)  # before its checkpoints are read
    if args.resume == 'auto':
        path = (newest_checkpoint(folder) or '') if utils.is_primary(args) else ''
        if not path and os.path.exists(os.path.join(folder, 'args.yaml')):
            _logger.info(f'No checkpoint in {folder}: the run begins again.')
    if args.distributed:
        path = of_the_first(path)
    if is_hub_name(path):
        with usage_errors(f'--resume {path}'):
            return download(path, 'last.pth.tar', WEIGHTS_NAME)
    if path and args.distributed and not os.path.isfile(path):
        raise UsageError(f'--resume {path}: not found on {socket.gethostname()}. All machines must share the folder.')
    return path


def compile_task(args: argparse.Namespace, task: TrainingTask) -> None:
    """Compile the model of a task if --torchcompile is given. Call it before the model is wrapped for distribution."""
    if not args.torchcompile:
        return
    mode = f' --torchcompile-mode {args.torchcompile_mode}' if args.torchcompile_mode else ''
    with usage_errors(f'--torchcompile {args.torchcompile}{mode}'):
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)


def _prepare_task(setup: Setup) -> None:
    """Set up the EMA, compile and distribute the model, after its weights have been loaded."""
    args, task = setup.args, setup.task
    if args.distributed:
        # Each process has its own seed, and setup_ema copies the weights before DDP synchronizes them.
        for tensor in task.get_trainable_module().state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    if args.model_ema:
        setup_ema(args, task, setup.resumed_from)
    compile_task(args, task)
    if args.distributed:
        options = dict(broadcast_buffers=False) if args.no_ddp_bb else {}
        task.prepare_distributed(device_ids=[setup.device] if setup.device.type != 'cpu' else None, **options)


def _with_schedule(setup: Setup) -> Setup:
    """Return the setup with the learning rate schedule and the number of epochs."""
    args, updates_per_epoch = setup.args, -(-len(setup.loaders.train) // setup.args.grad_accum_steps)
    with usage_errors(f'--sched {args.sched}'):
        scheduler, num_epochs = create_scheduler_v2(
            setup.optimizer,
            **scheduler_kwargs(args, decreasing_metric=setup.decreasing),
            updates_per_epoch=updates_per_epoch,
        )
    if args.stop_epoch is not None and args.stop_epoch > num_epochs:
        raise UsageError(f'--stop-epoch {args.stop_epoch} must not exceed the {num_epochs} epochs of the run.')
    if args.multimix != 'off' and args.multimix_start_epoch >= num_epochs:
        raise UsageError(
            f'--multimix-start-epoch {args.multimix_start_epoch} must be less than the {num_epochs} epochs of the run, '
            'which are counted from 0.')
    stop_epoch = args.stop_epoch or num_epochs
    if (args.start_epoch or 0) >= stop_epoch:
        raise UsageError(f'--start-epoch {args.start_epoch} must be less than the {stop_epoch} epochs to train.')
    return replace(
        setup, scheduler=scheduler, updates_per_epoch=updates_per_epoch, num_epochs=num_epochs, stop_epoch=stop_epoch)


def build_run(args: argparse.Namespace) -> RunState:
    """Build a run, ready to start or continue. With --validate it has no optimizer and no schedule.

    Nothing is written, but an existing output folder is locked in order to continue in it.

    Raises:
        UsageError: if options, data, model or checkpoint are invalid.
    """
    unrepeated = (*COMMAND_LINE_ONLY, 'dry_run', 'resume', 'start_epoch', 'no_resume_opt')
    options = {name: value for name, value in vars(args).items() if name not in unrepeated}
    device = _setup_device(args)
    path, checkpoint = '' if args.validate else _checkpoint_to_resume(args), {}
    setup = _build_setup(args, options, device, path)
    if args.validate:
        return RunState(setup)
    with usage_errors(f'--opt {args.opt}'):
        setup = replace(setup, optimizer=create_optimizer_v2(
            setup.task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs))
    if path.endswith('.safetensors'):
        load_weights(setup.task, path, args.resume)
    elif path:
        check_continues(args, path)
        checkpoint = resume(setup, path)
        setup = replace(setup, resumed_from=path)
    _prepare_task(setup)
    state = RunState(_with_schedule(setup))
    if args.distributed:
        state.stop.connect(args.dist_timeout)
    set_start(state, checkpoint)
    return state
