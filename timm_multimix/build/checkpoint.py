"""Read and verify checkpoints."""
import os
import pickle
import zipfile
from contextlib import suppress
from typing import Any

from timm.models import load_state_dict
from timm.utils import load_checkpoint_metadata

from ..common.errors import UsageError
from .checkpoint_format import wrong_entry

_NO_CHECKPOINT = 'it is not a PyTorch checkpoint'
_OTHER_WEIGHTS = ('.safetensors', '.npz', '.npy')  # formats that timm also reads


def _why_damaged(path: str) -> str | None:
    """Return why a file is damaged, None if it is intact or of another format. PyTorch does not verify checksums."""
    if os.path.getsize(path) == 0:
        return 'it is empty'
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return None if broken is None else f'it is damaged ({broken} differs from its checksum)'
    with open(path, 'rb') as file:
        if file.read(4) == b'PK\x03\x04':
            return 'it is truncated'
    return None  # the format before PyTorch 1.6, or another format


def _read(path: str, verify: bool) -> tuple[Any, str | None]:
    """Load a file as plain data and return (content, None), or (None, reason) if that fails."""
    try:
        reason = _why_damaged(path) if verify else None
        return (load_checkpoint_metadata(path) if reason is None else None), reason
    except (RuntimeError, pickle.UnpicklingError) as error:
        is_foreign = 'weights' in str(error).replace(path, '').lower()  # in PyTorch's message
        return None, 'it contains objects that are not data' if is_foreign else _NO_CHECKPOINT
    except Exception:  # unpickling other formats raises errors of many types
        return None, 'it is not a PyTorch checkpoint, or it is incomplete'


def check_weights_file(path: str) -> None:
    """Check that a file contains weights, after timm has failed to load it into the model.

    Raises:
        UsageError: if the file is damaged or contains no weights.
    """
    if path.endswith(_OTHER_WEIGHTS):
        return
    _, reason = _read(path, verify=True)
    if reason == _NO_CHECKPOINT:  # maybe the format before PyTorch 1.6
        with suppress(Exception):
            load_state_dict(path)
            return
    if reason is not None:
        raise UsageError(f'{path} contains no weights: {reason}.')


def read_checkpoint(path: str, verify: bool = True) -> dict:
    """Load a checkpoint as plain data.

    Args:
        path: The file.
        verify: Read the whole file and verify its checksums. Otherwise damaged tensors are not detected.

    Returns:
        Content of the checkpoint.

    Raises:
        UsageError: if the file is not a checkpoint of a model, or is damaged.
    """
    checkpoint, reason = _read(path, verify)
    if reason is None and (
            not isinstance(checkpoint, dict) or not any(key in checkpoint for key in ('state_dict', 'model'))):
        reason = 'it has no state_dict'
    if reason is None:
        reason = wrong_entry(checkpoint)
    if reason is not None:
        raise UsageError(f'{path} is not a training checkpoint: {reason}.')
    return checkpoint
