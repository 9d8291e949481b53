"""Training loop and validation loop."""
import logging
import os
import pickle
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torchvision
from timm import utils
from timm.task import evaluation_sample_limit
from torch import nn

from ..build.loaders import TRAINING
from ..common.console import Averages, EpochReporter
from ..common.errors import RunError
from ..common.files import create
from ..data.loading import batches_of
from .checkpoints import RunSaver
from .progress import take_progress
from .run import Run
from .unreadable import begin_epoch, count_unreadable

_logger = logging.getLogger(__name__)


def _begin_epoch(run: Run, epoch: int) -> None:
    """Set the epoch of dataset, samplers and task, and switch mixup off at --mixup-off-epoch."""
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


def _batches(loader: Iterable) -> Iterator[tuple[Any, torch.Tensor]]:
    """Iterate over a loader and convert its errors to a RunError with a message of one line."""
    batches = batches_of(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            _logger.debug('', exc_info=True)
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            # OSError, EOFError and UnpicklingError occur when a worker dies while it sends a batch.
            hint = '' if isinstance(error, RuntimeError) else ' A worker may have died for lack of memory.'
            raise RunError(f'A batch could not be loaded: {reason[0].rstrip(".")}.{hint}') from error
        yield batch


def _to_device(run: Run, input: Any, target: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Move a batch to the device of the model, unless timm's prefetcher has already done so."""
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
    """Return the loss scale of a batch if the batch size varies with image size, sequence length or rank, else 1."""
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


def _clip_parameters(run: Run) -> Any:
    return run.task.get_clip_parameters(exclude_head='agc' in run.args.clip_mode)


def _backward(run: Run, loss: torch.Tensor) -> None:
    """Run the backward pass only: the optimizer must wait until the loss is known to be finite."""
    optimizer, scaler = run.optimizer, run.precision.loss_scaler
    second_order = getattr(optimizer, 'is_second_order', False)
    if scaler is None:
        loss.backward(create_graph=second_order)
    else:
        scaler(loss, optimizer, create_graph=second_order, need_update=False)


def _update(run: Run) -> None:
    """Clip gradients and step the optimizer. The loss scaler skips the step if gradients overflowed."""
    args, optimizer, scaler = run.args, run.optimizer, run.precision.loss_scaler
    if scaler is not None:
        scaler = scaler._scaler  # timm's NativeScaler does not step without a backward pass
    if args.clip_grad is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        utils.dispatch_clip_grad(_clip_parameters(run), value=args.clip_grad, mode=args.clip_mode)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def _decide(run: Run, epoch: int, index: int) -> dict[str, bool]:
    """Return whether the batch uses MultiMix, as keyword arguments of the task. Call it before mixup is applied."""
    schedule = run.loaders.schedule
    if not schedule.alternates:
        return {}
    if run.loaders.mixup_fn is not None:
        run.loaders.mixup_fn.mixes_images = schedule.mixes_images(epoch, index)
    return dict(multimix=schedule.is_multimix(epoch, index))


def _train_step(
        run: Run,
        input: Any,
        target: torch.Tensor,
        decision: dict[str, bool],
        accum_steps: int,
        is_update: bool,
) -> tuple[dict, bool, bool]:
    """Run the forward and backward pass of a batch, and the update if this is its last batch.

    Returns:
        Output of the task; whether the loss is finite; whether all losses of the update so far are finite.
    """
    run.guard.remember()
    waits = is_update or not run.args.distributed
    with nullcontext() if waits else run.task.no_sync():
        with run.precision.autocast():
            try:
                result = run.task(input, target, **decision)
            except ValueError as error:  # such as NaN targets after mixup
                _logger.debug('', exc_info=True)
                raise RunError(f'The loss cannot be computed in {run.watchdog.place}: {error}') from error
        run.guard.watch(result['loss'], is_update)
        _backward(run, result['loss'] * (_gradient_scale(run, input) / accum_steps))
    batch_passed, update_passed = run.guard.passed()
    if is_update and update_passed:
        _update(run)
    return result, batch_passed, update_passed


def _step_metrics(result: dict, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the loss, its terms and, for class-index targets, the top-1 accuracy of the unmixed output."""
    values = {name: value for name, value in result.items() if isinstance(value, torch.Tensor) and value.ndim == 0}
    output = result.get('output')
    if isinstance(output, torch.Tensor) and output.ndim == 2 and target.ndim == 1:
        values['top1'] = 100.0 * (output.detach().argmax(dim=1) == target).float().mean()
    return values


def _accumulation(index: int, num_batches: int, accum_steps: int) -> tuple[int, bool]:
    """Return the number of batches in the update of batch `index`, and whether the batch is the last of them."""
    remainder = num_batches % accum_steps
    steps = remainder if index >= num_batches - remainder else accum_steps
    return steps, index == num_batches - 1 or (index + 1) % accum_steps == 0


def learning_rate(run: Run) -> float:
    """Return the learning rate, averaged over the parameter groups."""
    rates = [group['lr'] for group in run.optimizer.param_groups]
    return sum(rates) / len(rates)


def _after_update(run: Run, num_updates: int, passed: bool) -> None:
    """Reset gradients, update the EMA unless the update was skipped, and step the schedule."""
    run.optimizer.zero_grad()
    if passed:
        run.task.update_ema(step=num_updates)
    if run.args.synchronize_step and run.device.type in ('cuda', 'npu'):
        getattr(torch, run.device.type).synchronize()
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=num_updates)


def _save_recovery(run: Run, epoch: int, update: int, averages: Averages, saver: RunSaver | None) -> None:
    """Save a recovery checkpoint at each --recovery-interval and before the run stops at the request of the user."""
    stops = run.stop.requested()
    if stops or (run.args.recovery_interval and (update + 1) % run.args.recovery_interval == 0):
        progress = take_progress(run, averages)
        if saver is not None:
            saver.save_recovery(epoch, update, progress)
    if stops:
        raise KeyboardInterrupt


def _save_images(run: Run, input: Any, batch: int) -> None:
    path = os.path.join(run.folder, f'train-batch-{batch}.jpg')
    views = run.args.multimix_views if run.args.multimix != 'off' else 1
    images = input.unflatten(1, (views, -1)).flatten(0, 1)
    with create(path) as file:
        torchvision.utils.save_image(images, file, format='jpeg', padding=0, normalize=True)


def _epoch_metrics(run: Run, epoch: int, averages: Averages) -> dict[str, float]:
    metrics = averages.compute(run.args.distributed)
    if 'loss' not in metrics:
        raise RunError(
            f'No loss of epoch {epoch} was finite. Lower the learning rate, clip gradients (--clip-grad), or check the '
            'inputs for NaN.',
            is_shared=True)
    return {**metrics, 'unreadable': count_unreadable(run, TRAINING)}


def train_epoch(run: Run, epoch: int, saver: RunSaver | None = None) -> tuple[dict[str, float], float]:
    """Train for one epoch.

    Args:
        run: The run.
        epoch: Number of the epoch, from 0.
        saver: Writes recovery checkpoints; None on all processes but the first.

    Returns:
        Averages over the epoch ('loss', its terms, 'top1' for class-index targets, and 'unreadable', the number of
        images that could not be read), and images per second.

    Raises:
        KeyboardInterrupt: if the user stops the run. A recovery checkpoint has been written.
        RunError: if losses are not finite, a batch cannot be loaded, or a checkpoint cannot be written.
    """
    args, loader, resumable = run.args, run.loaders.train, run.loaders.resumable
    _begin_epoch(run, epoch)
    module = run.task.get_trainable_module()
    module.train()
    names = ('loss', *run.task.loss_names) if run.loaders.schedule.alternates else ()
    averages = Averages(run.device, names)
    first = 0
    if run.interrupted is not None:
        averages.load_state_dict(run.interrupted)
        first, run.interrupted = run.progress['consumed'], None
    else:
        begin_epoch(run)
    run.progress = None
    reporter = EpochReporter(
        epoch, run.updates_per_epoch, args.log_interval, args.world_size, done=first // args.grad_accum_steps)
    run.optimizer.zero_grad()
    waiting_since = time.perf_counter()
    try:
        for index, (input, target) in enumerate(_batches(loader), start=first):
            accum_steps, is_update = _accumulation(index, len(loader), args.grad_accum_steps)
            run.watchdog.move(f'epoch {epoch}, update {index // args.grad_accum_steps}')
            input, target = _to_device(run, input, target)
            decision = _decide(run, epoch, index)
            if run.loaders.mixup_fn is not None:
                input, target = run.loaders.mixup_fn(input, target)
            reporter.add(_num_images(input), time.perf_counter() - waiting_since)
            result, batch_passed, update_passed = _train_step(
                run, input, target, decision, accum_steps, is_update)
            averages.update(_step_metrics(result, target), _num_images(input) if batch_passed else 0)
            if resumable is not None:
                resumable.advance()
            if is_update:
                update = index // args.grad_accum_steps
                lr = learning_rate(run)
                run.guard.finish_update(
                    update_passed, f'in epoch {epoch}, update {update}, at learning rate {lr:.3g}')
                _after_update(run, epoch * run.updates_per_epoch + update + 1, update_passed)
                _save_recovery(run, epoch, update, averages, saver)
                reporter.step()
                if reporter.is_due(update):
                    so_far = averages.compute(args.distributed)
                    if averages.latest:
                        reporter.report(update, {'loss': averages.latest['loss'].item()}, so_far, lr)
                    if saver is not None and args.save_images and not isinstance(input, dict):
                        _save_images(run, input, index)
            waiting_since = time.perf_counter()
    finally:
        images_per_second = reporter.close()
    if hasattr(run.optimizer, 'sync_lookahead'):
        run.optimizer.sync_lookahead()
    run.progress = take_progress(run, averages)  # saved if validation is interrupted
    return _epoch_metrics(run, epoch, averages), images_per_second


@torch.inference_mode()
def validate(run: Run, model: nn.Module) -> dict[str, float]:
    """Validate a model with the task's evaluator.

    Args:
        run: The run.
        model: An evaluation model of the task: trained, EMA or teacher weights.

    Returns:
        Metrics over the validation set, reduced over all processes.
    """
    args, loader = run.args, run.loaders.evaluation
    evaluator = run.task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    model.eval()
    run.loaders.validated = True
    for index, (input, target) in enumerate(_batches(loader)):
        run.watchdog.move(f'validation, batch {index}')
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
