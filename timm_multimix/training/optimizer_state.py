"""Check and load the optimizer state of a checkpoint."""
import argparse
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from timm.optim import get_optimizer_info
from torch.optim import Optimizer

from ..common.errors import UsageError
from .saved_weights import arguments_of

_LOOKAHEAD = 'lookahead_'
_REMEDY = 'or give --no-resume-opt, which resets the optimizer'


def _identity(name: str, options: Mapping[str, Any]) -> tuple:
    """Return a key that is equal for aliases of the same optimizer with the same --opt-kwargs."""
    name = name.lower()
    base = name.removeprefix(_LOOKAHEAD)
    try:
        info = get_optimizer_info(base)
        return name != base, info.opt_class, info.defaults or {}, dict(options)
    except ValueError:  # an optimizer of another version of timm
        return name != base, base, {}, dict(options)


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


def load_optimizer(optimizer: Optimizer, checkpoint: Mapping[str, Any], path: str) -> None:
    """Load the optimizer state of a checkpoint, if it has one.

    Raises:
        UsageError: if the state does not fit the parameters of the model.
    """
    if 'optimizer' not in checkpoint:
        return
    try:
        optimizer.load_state_dict(deepcopy(checkpoint['optimizer']))  # the tensors of the checkpoint are memory-mapped
    except Exception as error:
        raise UsageError(
            f'The optimizer state in {path} does not fit this run: {error}. Use the options of the original run, '
            f'{_REMEDY}.') from error
