"""Validate the types of the checkpoint entries that this package reads."""
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from .saved_weights import WEIGHTS

# A schema is a type, None, a dict of schemas for the entries of a dict (the key ANY matches all other keys), a list
# with the schema of the items, or a tuple of alternatives. Entries may be missing: the code that reads them raises
# KeyError.
ANY = '*'
_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, None)

_RANDOM_STATE = {'python': [object], 'numpy': [object], 'torch': bytes}
_LOADER = {
    'consumed': int, 'epoch_start': (_RANDOM_STATE, None), 'before': (_RANDOM_STATE, None), 'now': _RANDOM_STATE,
    'seed': (_RANDOM_STATE, None), 'workers': {ANY: _RANDOM_STATE}}
_PROCESS = {
    'random': _RANDOM_STATE, 'loader': (_LOADER, None), 'statistics': {ANY: torch.Tensor},
    'averages': ({'sums': {ANY: _NUMBER}, 'counts': {ANY: int}}, None)}
_PROGRESS = {
    'in_epoch': bool, 'consumed': int, 'processes': [_PROCESS], 'shape': {ANY: int}, 'validated': bool,
    'scheduler': ({'inner': {ANY: object}, 'restore_lr': (None, [object]), 'lr': [_NUMBER]}, None),
    'average': (torch.Tensor, None)}
_SAVER = {
    'checkpoint_files': [[(str, *_OPTIONAL_NUMBER)]], 'best_epoch': (int, None), 'best_metric': _OPTIONAL_NUMBER,
    'pending': [_OPTIONAL_NUMBER]}
_WEIGHTS = {ANY: object}

_ENTRIES = {
    'epoch': (int, None),
    'arch': (str, None),
    'args': ({ANY: object}, Namespace, None),
    'version': int,
    'state_dict': _WEIGHTS,
    'state_dict_ema': _WEIGHTS,
    'state_dict_teacher': _WEIGHTS,
    'model_ema': _WEIGHTS,
    'task_state': ({ANY: object}, None),
    'task_state_ema': ({ANY: object}, None),
    'optimizer': {'state': {ANY: {ANY: object}}, 'param_groups': [{ANY: object}]},
    'amp_scaler': {ANY: object},
    'saver': (_SAVER, None),
    'progress': (_PROGRESS, None),
    'metric': _OPTIONAL_NUMBER,
    'eval_weights': (str, None),
    'metrics': ({ANY: {ANY: _NUMBER}}, None),
    'temperature': _NUMBER,
    'metric_of': (str, None),  # before eval_weights
    'weights_of': (str, None),  # before eval_weights
    'class_to_idx': ({ANY: int}, None),
}
_NAMES_OF_WEIGHTS = ('state_dict', 'state_dict_ema', 'state_dict_teacher', 'model', 'model_ema')

# Arguments that are compared or used when a checkpoint is read.
_ARGUMENTS = {
    'model': str, 'opt': str, 'opt_kwargs': ({ANY: object}, None), 'eval_metric': str, 'seed': int,
    'lr': _OPTIONAL_NUMBER, 'weight_decay': _OPTIONAL_NUMBER, 'momentum': _OPTIONAL_NUMBER,
    'opt_eps': _OPTIONAL_NUMBER, 'opt_betas': ([_NUMBER], None), 'layer_decay': _OPTIONAL_NUMBER,
    'multimix': str, 'multimix_teacher': str, 'calibrate': (str, None), 'val_split': (str, None),
}


def _kind(schema: Any) -> str:
    if isinstance(schema, tuple):
        return ' or '.join(dict.fromkeys(_kind(part) for part in schema))
    if schema is None:
        return 'None'
    if isinstance(schema, type):
        return schema.__name__
    return type(schema).__name__


def _is_of(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not (isinstance(value, bool) and kind in (int, float))


def _mismatch(value: Any, schema: Any, name: str) -> str | None:
    """Return the first difference between a value and a schema as a clause, None if there is none."""
    wrong = f'its {name} is of type {type(value).__name__}, not {_kind(schema)}'
    if isinstance(schema, tuple):
        mismatches = [_mismatch(value, part, name) for part in schema]
        same_type = [text for text, part in zip(mismatches, schema, strict=True)
                     if isinstance(part, (dict, list)) and isinstance(value, type(part))]
        return None if None in mismatches else (same_type or [wrong])[0]
    if schema is None or isinstance(schema, type):
        matches = value is None if schema is None else _is_of(value, schema)
        return None if matches else wrong
    if isinstance(schema, list):
        if not isinstance(value, (list, tuple)):
            return wrong
        items = ((f'{name}[{index}]', item, schema[0]) for index, item in enumerate(value))
    else:
        if not isinstance(value, Mapping):
            return wrong
        items = ((f'{name}[{key!r}]', item, schema.get(key, schema.get(ANY, object))) for key, item in value.items())
    return next(filter(None, (_mismatch(item, part, place) for place, item, part in items)), None)


def _wrong_weights(checkpoint: Mapping[str, Any]) -> str | None:
    for name in _NAMES_OF_WEIGHTS:
        if name not in checkpoint or (name == 'model' and 'state_dict' in checkpoint):
            continue
        weights = checkpoint[name]
        if not isinstance(weights, Mapping):
            return f'its {name} is of type {type(weights).__name__}, not dict'
        for key, value in weights.items():
            is_tensor = isinstance(value, torch.Tensor)
            if not isinstance(key, str) or not (is_tensor or key.endswith('_extra_state')):
                return f'its {name}[{key!r}] is not a named tensor'
    return None


def wrong_entry(checkpoint: Mapping[str, Any]) -> str | None:
    """Check the types of the checkpoint entries that this package reads.

    Args:
        checkpoint: Content of the checkpoint.

    Returns:
        A clause about the first invalid entry for an error message, None if all entries are valid.
    """
    for name, schema in _ENTRIES.items():
        if name in checkpoint and (wrong := _mismatch(checkpoint[name], schema, name)):
            return wrong
    args = checkpoint.get('args') or {}
    args = vars(args) if isinstance(args, Namespace) else args
    if not all(isinstance(name, str) for name in args):
        return 'its args have keys that are not strings'
    for name, schema in _ARGUMENTS.items():
        if name in args and (wrong := _mismatch(args[name], schema, f'args[{name!r}]')):
            return wrong
    if (checkpoint.get('epoch') or 0) < -1 or ((checkpoint.get('progress') or {}).get('consumed', 0)) < 0:
        return 'its epoch or its number of batches in the epoch is negative'
    for name in ('metric_of', 'weights_of'):
        if checkpoint.get(name) not in (None, *_NAMES_OF_WEIGHTS):
            return f'its {name} is not the name of a weight entry'
    if checkpoint.get('eval_weights') not in (None, *WEIGHTS):
        return f'its eval_weights is not one of {", ".join(WEIGHTS)}'
    saver, pairs = checkpoint.get('saver'), []
    if saver is not None:
        missing = [name for name in _SAVER if name not in saver]
        if missing:
            return f'its saver has no {missing[0]}'
        pairs = [*saver['checkpoint_files'], saver['pending']]
    if any(len(pair) != 2 or isinstance(pair[1], str) for pair in pairs) or not all(
            isinstance(pair[0], str) for pair in pairs[:-1]):
        return 'its saver contains entries that are not pairs of a name and a metric'
    return _wrong_weights(checkpoint)
