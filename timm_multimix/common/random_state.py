"""Random state of a process as plain data: Python, NumPy, PyTorch and the device."""
import random
from typing import Any

import numpy as np
import torch


def _device_module(device: torch.device | None) -> Any:
    """PyTorch's module for a device with its own random state; None for other devices."""
    if device is None or device.type == 'cpu':
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, 'set_rng_state') else None


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the random state of this process and of a device, as plain data that can be loaded safely."""
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
    """Set the random state of this process. The state of another type of device is ignored.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: if the state is invalid.
    """
    random.setstate(state['python'])
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_as_tensor(state['torch']))
    module = _device_module(device)
    if module is not None and device.type in state:
        module.set_rng_state(_as_tensor(state[device.type]))


def check_random_state(state: dict[str, Any]) -> None:
    """Check a random state without setting it. Raise the errors of set_random_state."""
    random.Random().setstate(state['python'])
    kind, keys, *rest = state['numpy']
    np.random.RandomState().set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
    generator_at(state)


def generator_at(state: dict[str, Any]) -> torch.Generator:
    """Create a CPU generator that continues from PyTorch's state in a random state."""
    return torch.Generator().set_state(_as_tensor(state['torch']))
