"""Read checkpoints, and verify their checksums and the types of their entries."""
import os
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import load_checkpoint_metadata

from ..common.errors import UsageError
from ..common.random_state import check_random_state
from ..data.class_names import valid_classes
from .saved_weights import WEIGHTS

_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, None)
_WEIGHT_ENTRIES = ('state_dict', 'state_dict_ema', 'state_dict_teacher', 'model', 'model_ema')
ANY = '*'


def _fits(value: Any, schema: Any) -> bool:
    """Return whether a value fits a schema.

    A schema is a type, None, a dict of schemas for the entries of a dict (the key ANY matches all other keys), a list
    with the schema of the items, a tuple of alternatives, or a function that returns whether a value is valid. Entries
    may be missing: the code that reads them raises KeyError.
    """
    if isinstance(schema, tuple):
        return any(_fits(value, part) for part in schema)
    if isinstance(schema, list):
        return isinstance(value, (list, tuple)) and all(_fits(item, schema[0]) for item in value)
    if isinstance(schema, dict):
        return isinstance(value, Mapping) and all(
            _fits(item, schema.get(key, schema.get(ANY, object))) for key, item in value.items())
    if isinstance(schema, type):
        return isinstance(value, schema) and not (isinstance(value, bool) and schema in (int, float))
    return value is None if schema is None else schema(value)


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and (isinstance(item, torch.Tensor) or name.endswith('_extra_state'))
        for name, item in value.items())


def _is_arguments(value: Any) -> bool:
    values = vars(value) if isinstance(value, Namespace) else value
    return _fits(values, _ARGUMENTS) and all(isinstance(name, str) for name in values)


def _is_random_state(value: Any) -> bool:
    try:
        check_random_state(value)
    except (LookupError, TypeError, ValueError, RuntimeError):
        return False
    return True


# Arguments that are compared or used when a checkpoint is read.
_ARGUMENTS = {
    'model': str, 'opt': str, 'opt_kwargs': ({ANY: object}, None), 'eval_metric': str, 'seed': int,
    'lr': _OPTIONAL_NUMBER, 'weight_decay': _OPTIONAL_NUMBER, 'momentum': _OPTIONAL_NUMBER,
    'opt_eps': _OPTIONAL_NUMBER, 'opt_betas': ([_NUMBER], None), 'layer_decay': _OPTIONAL_NUMBER,
    'multimix': str, 'multimix_teacher': str, 'calibrate': (str, None), 'val_split': (str, None),
}
_LOADER = {
    'consumed': int, 'epoch_start': (_is_random_state, None), 'before': (_is_random_state, None),
    'now': _is_random_state, 'seed': (_is_random_state, None), 'workers': {ANY: _is_random_state}}
_PROCESS = {
    'random': _is_random_state, 'loader': (_LOADER, None), 'statistics': {ANY: torch.Tensor},
    'averages': ({'sums': {ANY: _NUMBER}, 'counts': {ANY: int}}, None)}
_PROGRESS = {
    'in_epoch': bool, 'consumed': lambda value: _fits(value, int) and value >= 0, 'processes': [_PROCESS],
    'shape': {ANY: int}, 'validated': bool,
    'scheduler': ({'inner': {ANY: object}, 'restore_lr': (None, [object]), 'lr': [_NUMBER]}, None),
    'average': (torch.Tensor, None)}
_SAVER = {'best_epoch': (int, None), 'best_metric': _OPTIONAL_NUMBER}

_ENTRIES = {
    **dict.fromkeys(_WEIGHT_ENTRIES, _is_weights),
    'epoch': (lambda value: _fits(value, int) and value >= -1, None),
    'arch': (str, None),
    'args': (_is_arguments, None),
    'version': int,
    'task_state': ({ANY: object}, None),
    'task_state_ema': ({ANY: object}, None),
    'optimizer': {'state': {ANY: {ANY: object}}, 'param_groups': [{ANY: object}]},
    'amp_scaler': {ANY: object},
    'saver': (lambda value: _fits(value, _SAVER) and len(value) > 0, None),
    'progress': (_PROGRESS, None),
    'metric': _OPTIONAL_NUMBER,
    'eval_weights': lambda value: value in (None, *WEIGHTS),
    'metrics': ({ANY: {ANY: _NUMBER}}, None),
    'temperature': _NUMBER,
    'metric_of': lambda value: value in (None, *_WEIGHT_ENTRIES),  # before eval_weights
    'weights_of': lambda value: value in (None, *_WEIGHT_ENTRIES),  # before eval_weights
    'class_to_idx': lambda value: value is None or valid_classes(value) is not None,
}


def _wrong_entry(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the name of the first entry with an invalid type or value, None if all entries are valid."""
    for name, schema in _ENTRIES.items():
        is_read = name in checkpoint and not (name == 'model' and 'state_dict' in checkpoint)
        if is_read and not _fits(checkpoint[name], schema):
            return name
    return None


def _why_damaged(path: str) -> str | None:
    """Return why a PyTorch file is damaged, None if it is intact. PyTorch does not verify checksums."""
    if os.path.getsize(path) == 0:
        return 'it is empty'
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return None if broken is None else f'it is damaged ({broken} differs from its checksum)'
    with open(path, 'rb') as file:
        start = file.read(4)
    if start == b'PK\x03\x04':
        return 'it is truncated'
    is_pickled = start[:1] == b'\x80'  # the format before PyTorch 1.6
    return None if is_pickled else 'it is not a PyTorch checkpoint'


def check_weights_file(path: str) -> None:
    """Raise UsageError if a file that timm is about to load into a model is damaged."""
    is_checked = os.path.isfile(path) and not path.endswith(('.safetensors', '.npz', '.npy'))  # timm reads these too
    if is_checked and (reason := _why_damaged(path)):
        raise UsageError(f'{path} contains no weights: {reason}.')


def read_checkpoint(path: str, verify: bool = True) -> dict:
    """Load a checkpoint as plain data. Without `verify`, checksums are not verified: damaged tensors are not detected.

    Raises:
        UsageError: if the file is not a checkpoint of a model, or is damaged.
    """
    checkpoint: Any = None
    try:
        reason = _why_damaged(path) if verify else None
        if reason is None:
            checkpoint = load_checkpoint_metadata(path)
    except Exception:  # unpickling other formats raises errors of many types
        reason = 'it is not a PyTorch checkpoint, or it contains objects that are not data'
    if reason is None and (not isinstance(checkpoint, dict) or not {'state_dict', 'model'} & checkpoint.keys()):
        reason = 'it has no state_dict'
    elif reason is None and (entry := _wrong_entry(checkpoint)):
        reason = f'its entry {entry} is invalid'
    if reason is not None:
        raise UsageError(f'{path} is not a training checkpoint: {reason}.')
    return checkpoint
