"""The training loop and validation."""
import logging
import os
import time
from contextlib import nullcontext
from typing import Any

import torch
import torchvision
from timm import utils
from timm.task import evaluation_sample_limit
from torch import nn

from .logs import Averages, EpochReporter
from .run import Run

_logger = logging.getLogger(__name__)


def _begin_epoch(run: Run, epoch: int) -> None:
    """Tell everything that depends on it which epoch it is."""
    args, loader = run.args, run.loaders.train
    for part in (loader.dataset, getattr(loader, 'batch_sampler', None), getattr(loader, 'sampler', None)):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    if hasattr(run.task, 'set_epoch'):
        run.task.set_epoch(epoch)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if run.loaders.mixup_fn is not None:
            run.loaders.mixup_fn.mixup_enabled = False
        elif getattr(loader, 'mixup_enabled', False):
            loader.mixup_enabled = False


def _to_device(run: Run, input: Any, target: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Bring a batch to where the model is, unless timm's prefetcher has done so."""
    if run.args.no_prefetcher:
        if isinstance(input, dict):
            input = {
                name: value.to(run.device) if isinstance(value, torch.Tensor) else value
                for name, value in input.items()}
        else:
            input = input.to(device=run.device, dtype=run.precision.dtype)
        target = target.to(run.device)
    if run.args.channels_last and not isinstance(input, dict):
        input = input.contiguous(memory_format=torch.channels_last)
    return input, target


def _num_images(input: Any) -> int:
    return len(input['patches']) if isinstance(input, dict) else len(input)


def _gradient_scale(run: Run, input: Any) -> float | torch.Tensor:
    """Factor on a batch's gradient where batches differ in size: by image size, by sequence length, between ranks."""
    args, num_images = run.args, _num_images(input)
    if not args.naflex_loader and args.train_img_sizes is None:
        return 1.0
    mode = args.naflex_loss_scale if args.naflex_loader else args.variable_batch_loss_scale
    relative = num_images / run.loaders.batch_size
    scale = {'none': 1.0, 'sqrt': relative ** 0.5, 'linear': relative}[mode]
    if args.naflex_loader and args.distributed:
        total = utils.reduce_tensor(torch.tensor(float(num_images), device=run.device), 1)
        scale = scale * args.world_size * num_images / total
    return scale


def _backward(run: Run, loss: torch.Tensor, is_update: bool) -> None:
    """Backward pass, and with it, at the end of an accumulation, the optimizer's step."""
    args, optimizer = run.args, run.optimizer
    second_order = getattr(optimizer, 'is_second_order', False)
    parameters = None
    if args.clip_grad is not None:
        parameters = run.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
    if run.precision.loss_scaler is not None:
        run.precision.loss_scaler(
            loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters,
            create_graph=second_order, need_update=is_update)
        return
    loss.backward(create_graph=second_order)
    if is_update:
        if args.clip_grad is not None:
            utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        optimizer.step()


def _train_step(run: Run, input: Any, target: torch.Tensor, accum_steps: int, is_update: bool) -> dict:
    """Forward and backward pass of one batch; returns what the task returned."""
    waits = is_update or not run.args.distributed
    with nullcontext() if waits else run.task.no_sync():
        with run.precision.autocast():
            result = run.task(input, target)
        _backward(run, result['loss'] * (_gradient_scale(run, input) / accum_steps), is_update)
    return result


def _step_metrics(result: dict, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss, its parts, and where targets are classes the top-1 accuracy of the ordinary prediction."""
    values = {name: value for name, value in result.items() if isinstance(value, torch.Tensor) and value.ndim == 0}
    output = result.get('output')
    if isinstance(output, torch.Tensor) and output.ndim == 2 and target.ndim == 1:
        values['top1'] = 100.0 * (output.detach().argmax(dim=1) == target).double().mean()
    return values


def _accumulation(index: int, num_batches: int, accum_steps: int) -> tuple[int, bool]:
    """How many batches share the update that batch index belongs to, and whether it is the last of them."""
    remainder = num_batches % accum_steps
    steps = remainder if index >= num_batches - remainder else accum_steps
    return steps, index == num_batches - 1 or (index + 1) % accum_steps == 0


def learning_rate(run: Run) -> float:
    """The learning rate, averaged over the groups of parameters."""
    rates = [group['lr'] for group in run.optimizer.param_groups]
    return sum(rates) / len(rates)


def _after_update(run: Run, epoch: int, update: int, saver: utils.CheckpointSaver | None) -> None:
    num_updates = epoch * run.updates_per_epoch + update + 1
    run.optimizer.zero_grad()
    run.task.update_ema(step=num_updates)
    if run.args.synchronize_step and run.device.type in ('cuda', 'npu'):
        getattr(torch, run.device.type).synchronize()
    if saver is not None and run.args.recovery_interval and (update + 1) % run.args.recovery_interval == 0:
        saver.save_recovery(epoch, batch_idx=update)
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=num_updates)


def _save_images(run: Run, input: Any, batch: int) -> None:
    path = os.path.join(run.folder, f'train-batch-{batch}.jpg')
    torchvision.utils.save_image(input, path, padding=0, normalize=True)


def train_epoch(run: Run, epoch: int, saver: utils.CheckpointSaver | None = None) -> tuple[dict[str, float], float]:
    """Train for one epoch.

    Args:
        run: The run.
        epoch: Number of the epoch, from 0.
        saver: Writes recovery checkpoints; None on all processes but the first.

    Returns:
        Averages over the epoch ('loss', its parts, and 'top1' where targets are classes), and images per second.
    """
    args, loader = run.args, run.loaders.train
    _begin_epoch(run, epoch)
    run.task.get_trainable_module().train()
    averages = Averages(run.device)
    reporter = EpochReporter(epoch, run.updates_per_epoch, args.log_interval, args.world_size)
    run.optimizer.zero_grad()
    waiting_since = time.perf_counter()
    try:
        for index, (input, target) in enumerate(loader):
            accum_steps, is_update = _accumulation(index, len(loader), args.grad_accum_steps)
            input, target = _to_device(run, input, target)
            if run.loaders.mixup_fn is not None:
                input, target = run.loaders.mixup_fn(input, target)
            reporter.add(_num_images(input), time.perf_counter() - waiting_since)
            result = _train_step(run, input, target, accum_steps, is_update)
            averages.update(_step_metrics(result, target), _num_images(input))
            if is_update:
                update = index // args.grad_accum_steps
                lr = learning_rate(run)
                _after_update(run, epoch, update, saver)
                reporter.step()
                if reporter.is_due(update):
                    latest = {'loss': averages.latest['loss'].item()}
                    reporter.report(update, latest, averages.compute(args.distributed), lr)
                    if saver is not None and args.save_images and not isinstance(input, dict):
                        _save_images(run, input, index)
            run.stop.check()
            waiting_since = time.perf_counter()
    finally:
        images_per_second = reporter.close()
    if hasattr(run.optimizer, 'sync_lookahead'):
        run.optimizer.sync_lookahead()
    return averages.compute(args.distributed), images_per_second


@torch.inference_mode()
def validate(run: Run, model: nn.Module) -> dict[str, float]:
    """Validate a model with the task's evaluator.

    Args:
        run: The run.
        model: The task's evaluation model, of the weights or of their average.

    Returns:
        Metrics over the validation set, over all processes.
    """
    args, loader = run.args, run.loaders.evaluation
    evaluator = run.task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    model.eval()
    for input, target in loader:
        input, target = _to_device(run, input, target)
        with run.precision.autocast():
            output = model(input)
        output = output[0] if isinstance(output, (tuple, list)) else output
        if args.tta > 1:
            output = output.unfold(0, args.tta, args.tta).mean(dim=2)
            target = target[::args.tta]
        evaluator.update(output, target)
        run.stop.check()
    return dict(evaluator.compute(distributed=args.distributed))
