"""Check and load the optimizer state of a checkpoint."""
import argparse
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from timm.optim import get_optimizer_info
from torch.optim import Optimizer

from ..build.saved_weights import arguments_of
from ..common.errors import UsageError

_LOOKAHEAD = 'lookahead_'
# State with the shape of the parameter, in the optimizers of PyTorch and timm that have it.
_PARAMETER_BUFFERS = {'momentum_buffer', 'exp_avg', 'max_exp_avg_sq', 'square_avg', 'slow_buffer'}
_REMEDY = 'or give --no-resume-opt, which resets the optimizer'


def _as_lists(value: Any) -> Any:
    """Convert tuples to lists, as YAML files contain them."""
    if isinstance(value, Mapping):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _identity(name: str, options: Mapping[str, Any]) -> tuple:
    """Return a key that is equal for aliases of the same optimizer with the same --opt-kwargs."""
    name = name.lower()
    base = name.removeprefix(_LOOKAHEAD)
    try:
        info = get_optimizer_info(base)
        return name != base, info.opt_class, info.defaults or {}, _as_lists(options)
    except ValueError:  # an optimizer of another version of timm
        return name != base, base, {}, _as_lists(options)


def _described(name: str, options: Mapping[str, Any]) -> str:
    shown = ' '.join(f'{key}={value}' for key, value in options.items())
    return f'--opt {name}' + (f' --opt-kwargs {shown}' if shown else '')


def check_optimizer(args: argparse.Namespace, checkpoint: Mapping[str, Any], optimizer: Optimizer, path: str) -> None:
    """Check that the optimizer state of a checkpoint is of the optimizer of the run.

    Args:
        args: Arguments of the run.
        checkpoint: The checkpoint. Without an optimizer state it passes the check.
        optimizer: The optimizer of the run.
        path: Path of the checkpoint, for the error message.

    Raises:
        UsageError: if the state is of another optimizer, or of other --opt-kwargs.
    """
    if 'optimizer' not in checkpoint:
        return
    before = arguments_of(checkpoint)
    if before.get('opt'):
        options = before.get('opt_kwargs') or {}
        if _identity(before['opt'], options) != _identity(args.opt, args.opt_kwargs):
            old, new = _described(before['opt'], options), _described(args.opt, args.opt_kwargs)
            raise UsageError(
                f'{path} contains the optimizer state of {old}, but this run uses {new}. Continue with {old}, '
                f'{_REMEDY}.')
        return
    # Without the name of the optimizer only the names of its hyperparameters can be compared. Schedulers and other
    # versions of PyTorch add some.
    for saved, group in zip(checkpoint['optimizer']['param_groups'], optimizer.param_groups, strict=False):
        missing, unknown = set(group) - set(saved), set(saved) - set(group) - {'initial_lr', 'lr_scale'}
        if missing and unknown:
            raise UsageError(
                f'{path} contains the state of an optimizer other than --opt {args.opt}: it has '
                f'{", ".join(sorted(unknown))} and lacks {", ".join(sorted(missing))}. Continue with the optimizer '
                f'that wrote it, {_REMEDY}.')


def _check_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Check that a saved state has the types of hyperparameters and tensors with the shapes of the parameters.

    Raises:
        ValueError: if not.
    """
    for group, saved_group in zip(optimizer.param_groups, saved['param_groups'], strict=True):
        for name, value in group.items():
            saved_value = saved_group.get(name, value)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and not isinstance(saved_value, (int, float, torch.Tensor)):
                raise ValueError(f'{name} is {saved_value!r}')
        for parameter, index in zip(group['params'], saved_group['params'], strict=True):
            state = saved['state'].get(index, {})
            for name in _PARAMETER_BUFFERS & state.keys():
                shape = getattr(state[name], 'shape', None)
                if state[name] is not None and shape != parameter.shape:
                    raise ValueError(f'{name} of parameter {index} has shape {shape}, not {parameter.shape}')


def load_optimizer(optimizer: Optimizer, checkpoint: Mapping[str, Any], path: str) -> None:
    """Load the optimizer state of a checkpoint, if it has one.

    Raises:
        UsageError: if the state does not fit the parameters of the model.
    """
    if 'optimizer' not in checkpoint:
        return
    try:
        _check_state(optimizer, checkpoint['optimizer'])
        optimizer.load_state_dict(deepcopy(checkpoint['optimizer']))  # the tensors of the checkpoint are memory-mapped
    except Exception as error:
        raise UsageError(
            f'The optimizer state in {path} does not fit this run: {error}. Use the options of the original run, '
            f'{_REMEDY}.') from error
