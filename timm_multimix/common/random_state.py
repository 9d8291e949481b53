"""The random state of a process, as plain data: Python's, NumPy's, PyTorch's, and the device's."""
import random
from typing import Any

import numpy as np
import torch


def _device_module(device: torch.device | None):
    """PyTorch's module for a device with a random state of its own, or None."""
    if device is None or device.type == 'cpu':
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, 'set_rng_state') else None


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """Take the random state of this process.

    Args:
        device: Also of this device. The state lies on the host: reading it waits for nothing.

    Returns:
        Numbers, strings, tuples and bytes only, so that a checkpoint can hold it as data.
    """
    kind, keys, *rest = np.random.get_state()
    state = dict(
        python=random.getstate(),
        numpy=(kind, keys.tobytes(), *rest),
        torch=torch.get_rng_state().numpy().tobytes(),
    )
    module = _device_module(device)
    if module is not None:
        state[device.type] = module.get_rng_state().numpy().tobytes()
    return state


def _as_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Put this process into a random state. That of another kind of device is left alone.

    Args:
        state: From random_state.
        device: Also set the state of this device.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: if it is no random state.
    """
    random.setstate(state['python'])
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_as_tensor(state['torch']))
    module = _device_module(device)
    if module is not None and device.type in state:
        module.set_rng_state(_as_tensor(state[device.type]))


def check_random_state(state: dict[str, Any]) -> None:
    """Check a random state without changing that of the process.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: if it is no random state.
    """
    random.Random().setstate(state['python'])
    kind, keys, *rest = state['numpy']
    np.random.RandomState().set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
    generator_at(state)


def generator_at(state: dict[str, Any]) -> torch.Generator:
    """A generator of its own that draws what PyTorch's would draw from a state on."""
    return torch.Generator().set_state(_as_tensor(state['torch']))
