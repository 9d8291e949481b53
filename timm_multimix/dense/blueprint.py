"""Inspect the features and the modules of a model with a copy on the meta device."""
import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .layouts import Features

# 2 x 2 positions at stride 64
SMALL_IMAGE = 128
# Errors that modules raise for inputs of an unsupported shape.
SHAPE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value, including those in lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def blueprint(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, in evaluation mode. The copy needs no memory and no computation."""
    if any(hasattr(parameter, 'device_mesh') for parameter in model.parameters()):  # DTensors
        raise TypeError(
            f'{type(model).__name__} has sharded parameters: attach in dense mode before you shard the model, for '
            'example with fully_shard.')
    data = {}
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            empty = torch.empty_like(tensor, device='meta', requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            data[id(tensor)] = empty
    return copy.deepcopy(model, data).eval()


@contextlib.contextmanager
def watching(model: nn.Module, watch: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Context manager that calls watch(name, module, output) after every call of a submodule."""
    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: watch(name, module, output))
        for name, module in model.named_modules() if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _image_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Return image sizes to try: a small size, the sizes declared by the model and its modules, then common sizes."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    declared = [getattr(module, 'img_size', None) for module in model.modules()]
    sizes = [SMALL_IMAGE, *declared, (config.get('input_size') or ())[-2:], 224, *range(32, 545, 32)]
    sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes if size]
    return [size for size in dict.fromkeys(sizes) if len(size) == 2]


@torch.no_grad()
def run_example(model: nn.Module) -> tuple[nn.Module, torch.Tensor, Features]:
    """Run forward_features of a float32 copy of the model on one image, on the meta device.

    Returns:
        The copy, the image (1, 3, h, w) and the features.
    """
    twin = blueprint(model).float()
    channels = getattr(model, 'in_chans', None) or next((p.shape[1] for p in model.parameters() if p.ndim == 4), 3)
    sizes = _image_sizes(model)
    for size in sizes:
        image = torch.zeros(1, channels, *size, device='meta')
        try:
            return twin, image, twin.forward_features(image)
        except SHAPE_ERRORS as caught:
            error = caught
    raise ValueError(
        f'{type(model).__name__}.forward_features failed on the meta device for all image sizes '
        f'{", ".join(f"{height}x{width}" for height, width in sizes)}: set model.img_size to a size that the model '
        "accepts, or attach with mode='pooled'. The last error was "
        f'{type(error).__name__}: {error}') from error
