"""Replace the class of a module by a subclass, as FSDP and parametrizations do, and restore it."""
import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn


def _with_signature(method: Callable, replaced: Callable) -> Callable:
    """Copy a mixin's method, with the name, signature and docstring of the method that it overrides."""
    copy = types.FunctionType(
        method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    return functools.update_wrapper(copy, replaced)


@functools.cache
def _subclass(mixin: type, base: type) -> type:
    names = {'__module__': base.__module__, '__qualname__': base.__qualname__, '__doc__': base.__doc__}
    for name, method in vars(mixin).items():
        replaced = getattr(base, name, None)
        if isinstance(method, types.FunctionType) and isinstance(replaced, types.FunctionType):
            names[name] = _with_signature(method, replaced)
    return type(base.__name__, (mixin, SwappedModule, base), names)


def _rebuild(mixin: type, base: type) -> nn.Module:
    cls: Any = _subclass(mixin, base)
    return cls.__new__(cls)


class SwappedModule:
    """Base of all swapped classes. Pickling stores the mixin and the original class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        mixin, _, base = type(self).__bases__
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_rebuild, (mixin, base), *reduced[2:])


def swap_class(module: nn.Module, mixin: type) -> None:
    """Override methods of a module by a mixin. The class name, the state and isinstance checks do not change."""
    module.__class__ = _subclass(mixin, type(module))


def restore_class(module: nn.Module) -> None:
    """Undo swap_class. Raise RuntimeError if other code, such as fully_shard, has replaced the class since."""
    cls = type(module)
    if SwappedModule not in cls.__bases__:
        raise RuntimeError(
            f'{cls.__name__} cannot be restored, because its class was replaced after attach(), for example by '
            'fully_shard. If it returns a MultiMixOutput and MultiMix is not wanted, use its logits.')
    module.__class__ = cls.__bases__[-1]
