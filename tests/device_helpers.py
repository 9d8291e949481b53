"""An emulated accelerator: tensors on the device 'meta' that contain values, without float64."""
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device('meta')
# Operations that accept tensors on different devices: copies, and indexing, whose indices may be on the CPU.
_ACROSS_DEVICES = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.index, torch.ops.aten.index_put_}


class _DeviceTensor(torch.Tensor):
    """A tensor on the emulated device. Its values are in a tensor on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=DEVICE)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        return self.values.__reduce_ex__(protocol)

    def tolist(self) -> Any:  # not supported by PyTorch for subclasses
        return self.values.tolist()


def _run(func, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [isinstance(tensor, _DeviceTensor) for tensor in tensors]
    if any(ours) and func.overloadpacket not in _ACROSS_DEVICES and any(
            tensor.ndim for tensor, own in zip(tensors, ours, strict=True) if not own):
        raise RuntimeError(f'{func}: tensors are on different devices.')
    on_device = any(ours)
    if kwargs.get('device') is not None:
        on_device = torch.device(kwargs['device']) == DEVICE
        kwargs = {**kwargs, 'device': torch.device('cpu')}
    if func.overloadpacket is torch.ops.aten.copy_:
        on_device = ours[0]
    if on_device and kwargs.get('generator') is not None:
        raise RuntimeError(f'{func}: the generator is on the CPU, the tensor on the device.')
    result = func(*tree_map_only(_DeviceTensor, lambda tensor: tensor.values, args),
                  **tree_map_only(_DeviceTensor, lambda tensor: tensor.values, kwargs))
    if not on_device:
        return result
    if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
        raise TypeError(f'{func} returned float64 on a device that does not support it.')
    own = {id(tensor.values): tensor for tensor, is_own in zip(tensors, ours, strict=True) if is_own}
    return tree_map_only(
        torch.Tensor, lambda tensor: own[id(tensor)] if id(tensor) in own else _DeviceTensor(tensor), result)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Conversion(TorchFunctionMode):
    """Copies Python values to the emulated device: torch.tensor does not dispatch the device 'meta'."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            device = torch.get_default_device() if kwargs.get('device') is None else kwargs['device']
            return func(*args, **{**kwargs, 'device': 'cpu'}).to(device)
        return func(*args, **kwargs)


@contextmanager
def emulated_device() -> Iterator[None]:
    """Emulate the device 'meta'.

    Raises an error for float64 on the device, for operations on tensors of both devices, and for a generator of the
    CPU that draws on the device, as real devices do.
    """
    module = SimpleNamespace(
        get_rng_state=lambda *device: torch.get_rng_state(),
        set_rng_state=lambda state, *device: torch.set_rng_state(state))
    with mock.patch.object(torch, 'autocast', lambda *args, **options: nullcontext()), \
            mock.patch.object(torch, 'Generator', _Generator), \
            mock.patch.object(torch, 'meta', module, create=True), _Conversion(), _Dispatch():
        yield


class _Generator(torch.Generator):
    """PyTorch has no generator for the device 'meta'."""

    def __new__(cls, device='cpu'):
        return super().__new__(cls, 'cpu')
