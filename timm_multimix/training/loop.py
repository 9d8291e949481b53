"""Training loop of one epoch."""
import logging
import os
import pickle
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torchvision
from timm import utils

from ..build.loaders import TRAINING
from ..build.model import model_dtype
from ..common.console import Averages, EpochReporter
from ..common.errors import RunError
from ..common.files import create
from ..data.loading import batches_of
from .setup import Setup
from .state import RunState

_logger = logging.getLogger(__name__)


def shown(metrics: Mapping[str, float]) -> str:
    """Format metrics for log lines."""
    return '  '.join(f'{name} {value:.4g}' for name, value in metrics.items())


def _begin_epoch(state: RunState) -> None:
    """Set the epoch of dataset, samplers and task, and disable mixup from --mixup-off-epoch on."""
    setup, epoch = state.setup, state.epoch
    args, loader, mixup_fn = setup.args, setup.loaders.train, setup.loaders.mixup_fn
    parts = (loader.dataset, getattr(loader, 'batch_sampler', None), getattr(loader, 'sampler', None), setup.task)
    for part in parts:
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    setup.task.get_trainable_module().train()
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        (mixup_fn or loader).mixup_enabled = False
    if state.averages is None:  # not a resumed epoch
        state.averages = Averages(setup.device)
        for record in setup.loaders.unreadable.values():
            record.begin_epoch()


def read_batches(loader: Iterable) -> Iterator[tuple[Any, torch.Tensor]]:
    """Iterate over a loader and convert its errors to a RunError with a message of one line."""
    try:
        yield from batches_of(loader)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        _logger.debug('', exc_info=True)
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        # OSError, EOFError and UnpicklingError occur when a worker dies while it sends a batch.
        hint = '' if isinstance(error, RuntimeError) else ' A worker may have died for lack of memory.'
        raise RunError(f'A batch could not be loaded: {reason[0].rstrip(".")}.{hint}') from error


def to_device(setup: Setup, input: Any, target: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Move a batch to the device of the model, unless timm's prefetcher has already done so."""
    if setup.args.no_prefetcher:
        if isinstance(input, dict):
            input = {
                name: value.to(setup.device) if isinstance(value, torch.Tensor) else value
                for name, value in input.items()}
        else:
            input = input.to(device=setup.device, dtype=model_dtype(setup.args))
        target = target.to(setup.device)
    if setup.args.channels_last and not isinstance(input, dict):
        input = input.contiguous(memory_format=torch.channels_last)
    return input, target


def _gradient_scale(setup: Setup, num_images: int) -> float | torch.Tensor:
    """Return the loss scale of a batch if the batch size varies with image size, sequence length or rank, else 1."""
    args = setup.args
    if not args.naflex_loader and args.train_img_sizes is None:
        return 1.0
    mode = args.naflex_loss_scale if args.naflex_loader else args.variable_batch_loss_scale
    scale = (num_images / setup.loaders.batch_size) ** {'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}[mode]
    if args.naflex_loader and args.distributed:
        total = utils.reduce_tensor(torch.tensor(float(num_images), device=setup.device), 1)
        scale = scale * args.world_size * num_images / total
    return scale


def _mix_images(state: RunState, index: int, input: Any, target: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Apply mixup and CutMix on the device, if the loader does not apply them and the schedule selects this batch."""
    loaders = state.setup.loaders
    if loaders.mixup_fn is None:
        return input, target
    loaders.mixup_fn.mixes_images = loaders.schedule.mixes_images(state.epoch, index)
    return loaders.mixup_fn(input, target)


def _forward(state: RunState, index: int, input: Any, target: torch.Tensor) -> dict[str, Any]:
    """Return the output of the task. The key 'loss' contains the loss."""
    schedule, options = state.setup.loaders.schedule, {}
    if schedule.alternates:  # the same decision as for the images; otherwise the task decides
        options = dict(multimix=schedule.is_multimix(state.epoch, index))
    with state.setup.autocast():
        try:
            return state.setup.task(input, target, **options)
        except ValueError as error:  # such as NaN targets after mixup
            _logger.debug('', exc_info=True)
            raise RunError(f'The loss cannot be computed in {state.watchdog.place}: {error}') from error


def _scaler(setup: Setup) -> torch.amp.GradScaler:
    """Return PyTorch's scaler inside of timm's, which cannot make a step without a backward pass.

    Without a loss scaler it is disabled.
    """
    return setup.loss_scaler._scaler if setup.loss_scaler else torch.amp.GradScaler(enabled=False)


def _backward(setup: Setup, loss: torch.Tensor) -> None:
    """Run the backward pass only: the optimizer must wait until the loss is known to be finite."""
    _scaler(setup).scale(loss).backward(create_graph=getattr(setup.optimizer, 'is_second_order', False))


def _optimizer_step(setup: Setup) -> None:
    """Clip gradients and step the optimizer. The loss scaler skips the step if gradients overflowed."""
    args, scaler = setup.args, _scaler(setup)
    if args.clip_grad is not None:
        scaler.unscale_(setup.optimizer)
        parameters = setup.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
        utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
    scaler.step(setup.optimizer)
    scaler.update()


def _step_metrics(result: dict, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the loss, its terms and, for class-index targets, the top-1 accuracy of the unmixed output."""
    values = {name: value for name, value in result.items() if isinstance(value, torch.Tensor) and value.ndim == 0}
    output = result.get('output')
    if isinstance(output, torch.Tensor) and output.ndim == 2 and target.ndim == 1:
        values['top1'] = 100.0 * (output.detach().argmax(dim=1) == target).float().mean()
    return values


def learning_rate(setup: Setup) -> float:
    """Return the learning rate, averaged over the parameter groups."""
    rates = [group['lr'] for group in setup.optimizer.param_groups]
    return sum(rates) / len(rates)


def _after_update(setup: Setup, num_updates: int, passed: bool) -> None:
    """Reset gradients, update the EMA unless the update was skipped, and step the schedule."""
    setup.optimizer.zero_grad()
    if passed:
        setup.task.update_ema(step=num_updates)
    if setup.args.synchronize_step and setup.device.type in ('cuda', 'npu'):
        getattr(torch, setup.device.type).synchronize()
    if setup.scheduler is not None:
        setup.scheduler.step_update(num_updates=num_updates)


def _save_recovery(state: RunState, update: int) -> None:
    """Save a recovery checkpoint at each --recovery-interval and before the run stops at the request of the user."""
    stops, interval = state.stop.requested(), state.setup.args.recovery_interval
    if stops or (interval and (update + 1) % interval == 0):
        progress = state.state_dict()
        if state.saver is not None:
            state.saver.save_recovery(state.epoch, update, progress)
    if stops:
        raise KeyboardInterrupt


def _report(state: RunState, reporter: EpochReporter, update: int, lr: float) -> None:
    averages = state.averages.compute(state.setup.args.distributed)
    if state.averages.latest:
        reporter.report(update, {'loss': state.averages.latest['loss'].item()}, averages, lr)


def _save_images(setup: Setup, input: Any, batch: int) -> None:
    if isinstance(input, dict):
        return
    views = setup.args.multimix_views if setup.args.multimix != 'off' else 1
    images = input.unflatten(1, (views, -1)).flatten(0, 1)
    with create(os.path.join(setup.folder, f'train-batch-{batch}.jpg')) as file:
        torchvision.utils.save_image(images, file, format='jpeg', padding=0, normalize=True)


def _epoch_metrics(state: RunState, images_per_second: float) -> dict[str, float]:
    metrics = state.averages.compute(state.setup.args.distributed)
    if 'loss' not in metrics:
        raise RunError(
            f'No loss of epoch {state.epoch} was finite. Lower the learning rate, clip gradients (--clip-grad), or '
            'check the inputs for NaN.',
            is_shared=True)
    _logger.info(f'Epoch {state.epoch}: training  {shown(metrics)}  ({images_per_second:.1f} images/s)')
    unreadable = state.setup.loaders.warn_of_unreadable(TRAINING, f'Epoch {state.epoch}: ')
    return {**metrics, 'unreadable': unreadable}


def train_epoch(state: RunState) -> dict[str, float]:
    """Train the epoch of a run, or the rest of a resumed epoch.

    Returns:
        Averages over the epoch: 'loss', its terms, 'top1' for class-index targets, and 'unreadable', the number of
        images that could not be read.

    Raises:
        KeyboardInterrupt: if the user stops the run. A recovery checkpoint has been written.
        RunError: if losses are not finite, a batch cannot be loaded, or a checkpoint cannot be written.
    """
    setup, epoch, guard = state.setup, state.epoch, state.guard
    args, loader, optimizer, accum_steps = setup.args, setup.loaders.train, setup.optimizer, setup.args.grad_accum_steps
    first = state.consumed  # 0 unless the epoch was interrupted
    _begin_epoch(state)
    reporter = EpochReporter(
        epoch, setup.updates_per_epoch, args.log_interval, args.world_size, done=first // accum_steps)
    optimizer.zero_grad()
    waiting_since = time.perf_counter()
    try:
        for index, (input, target) in enumerate(read_batches(loader), start=first):
            update = index // accum_steps
            is_update = index == len(loader) - 1 or (index + 1) % accum_steps == 0
            state.watchdog.move(f'epoch {epoch}, update {update}')
            input, target = _mix_images(state, index, *to_device(setup, input, target))
            num_images = len(input['patches']) if isinstance(input, dict) else len(input)
            reporter.add(num_images, time.perf_counter() - waiting_since)

            guard.remember()
            with nullcontext() if is_update or not args.distributed else setup.task.no_sync():
                result = _forward(state, index, input, target)
                guard.watch(result['loss'], is_update)
                num_batches = min(accum_steps, len(loader) - update * accum_steps)  # in this update
                _backward(setup, result['loss'] * (_gradient_scale(setup, num_images) / num_batches))
            batch_passed, update_passed = guard.passed()
            if is_update and update_passed:
                _optimizer_step(setup)

            state.averages.update(_step_metrics(result, target), num_images if batch_passed else 0)
            if setup.loaders.resumable is not None:
                setup.loaders.resumable.advance()
            if is_update:
                lr = learning_rate(setup)
                guard.finish_update(update_passed, f'in {state.watchdog.place}, at learning rate {lr:.3g}')
                _after_update(setup, epoch * setup.updates_per_epoch + update + 1, update_passed)
                _save_recovery(state, update)
                reporter.step()
                if reporter.is_due(update):
                    _report(state, reporter, update, lr)
                    if state.saver is not None and args.save_images:
                        _save_images(setup, input, index)
            waiting_since = time.perf_counter()
    finally:
        images_per_second = reporter.close()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    return _epoch_metrics(state, images_per_second)
