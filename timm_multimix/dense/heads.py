"""Determine how to apply a model's head at every position.

A copy of the model on the meta device runs on one image to inspect the features. The head of the copy, with random
parameters, then runs on small feature maps.
"""
import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .head_norm import check_batch_norms
from .positions import Features, Head, Layout, as_streams, modules_below

TOLERANCE = 1e-4
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


def _called_modules(model: nn.Module, features: Features) -> dict[str, nn.Module]:
    """Return the modules that forward_head calls, by name, and the model itself."""
    called = {'': model}
    found = None
    try:
        with watching(model, lambda name, module, _: called.__setitem__(name, module)):
            output = model.forward_head(features)
        if not isinstance(output, torch.Tensor):
            found = f'a {type(output).__name__}'
        elif output.ndim != 2:
            found = f'shape {tuple(output.shape)}'
    except SHAPE_ERRORS as error:
        found = f'an error: {error}'
    if found is not None:
        raise ValueError(
            f'{type(model).__name__}.forward_head must return logits (b, c) for the output of forward_features, got '
            f"{found}. Create the model with a classifier and with pooling (not with global_pool='').")
    return called


def _outermost(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of modules that are not submodules of other named modules, without the model itself."""
    names = [name for name in names if name]
    return tuple(name for name in names if not any(name.startswith(f'{other}.') for other in names))


def _with_random_values(model: nn.Module, twin: nn.Module, names: Iterable[str]) -> nn.Module:
    """Copy the twin, with the named modules on the CPU and random parameters. Initial values hide dependencies."""
    generator = torch.Generator('cpu').manual_seed(0)
    twin = copy.deepcopy(twin)
    for name in names:
        module, originals = twin.get_submodule(name), dict(model.get_submodule(name).named_buffers(recurse=False))
        module.to_empty(device='cpu', recurse=False)
        for parameter in module.parameters(recurse=False):
            scale, offset = (parameter[0].numel() ** -0.5, 0.0) if parameter.ndim > 1 else (0.5, 0.5)
            parameter.copy_(_random(parameter.shape, generator) * scale + offset)
        for key, buffer in module.named_buffers(recurse=False):
            if isinstance(module, _BatchNorm) and buffer.is_floating_point():
                buffer.copy_(_random(buffer.shape, generator).square() + 0.5)
            elif originals[key].is_meta:
                buffer.zero_()
            else:
                buffer.copy_(originals[key])
    return twin


def _random(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device='cpu', dtype=torch.float32)


def _run_head(twin: nn.Module, features: Features) -> torch.Tensor:
    with torch.autocast('cpu', enabled=False):
        return twin.forward_head(features)


def _declared_prefix_tokens(model: nn.Module) -> int | None:
    if getattr(model, 'num_prefix_tokens', None) is not None:
        return int(model.num_prefix_tokens)
    token = getattr(model, 'cls_token', None)
    return token.shape[-2] if isinstance(token, torch.Tensor) and token.ndim > 1 else None


def _find_layouts(model: nn.Module, head: Head, streams: Sequence[torch.Tensor]) -> Head:
    """Set the layout of each stream: forward_head must run on maps with fewer positions."""
    prefix = _declared_prefix_tokens(model) or 0
    channels_first_orders = (False, True)
    if streams[0].ndim > 3 and getattr(model, 'output_fmt', None) != 'NHWC':
        channels_first_orders = (True, False)
    # Two tokens, for an undeclared class token and one position, or for two distillation tokens.
    sizes = [(2,) if stream.ndim == 3 else (1,) * (stream.ndim - 2) for stream in streams]
    errors = []
    for channels_first in channels_first_orders:
        head = replace(head, layouts=tuple(
            Layout(channels_first, stream.ndim, prefix if stream.ndim == 3 and not channels_first else 0)
            for stream in streams))
        vectors = [stream.new_zeros(2, stream.shape[1 if channels_first else -1]) for stream in streams]
        try:
            if model.forward_head(head.constant_maps(vectors, sizes)).ndim == 2:
                return head
        except SHAPE_ERRORS as error:
            errors.append(str(error))
    shapes = ', '.join(str(tuple(stream.shape)) for stream in streams)
    raise ValueError(
        f"Dense MultiMix requires that {type(model).__name__}.forward_head runs on smaller maps than its features "
        f"{shapes}, and it does not: attach with mode='pooled'. {' / '.join(errors)}")


def _window(modules: dict[str, nn.Module]) -> tuple[int, int] | None:
    """Return the kernel size of an unpadded convolution in the head, or None."""
    for module in modules.values():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and max(module.padding) == 0:
            height, width = module.kernel_size
            return height, width
    return None


def _read_mask(twin: nn.Module, head: Head, streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a mask (r,) for each stream: the entries along the position axes that the prediction depends on."""
    with torch.enable_grad():
        inputs = [stream.clone().requires_grad_() for stream in streams]
        output = _run_head(twin, head.pack(inputs))
        gradients = torch.autograd.grad(output.square().sum(), inputs, allow_unused=True, materialize_grads=True)
    return [
        gradient.movedim(layout.channel_axis, -1).flatten(1, -2).abs().amax((0, 2)) > 0
        for gradient, layout in zip(gradients, head.layouts, strict=True)]


def _resolve_prefix(model: nn.Module, layout: Layout, mask: torch.Tensor) -> Layout:
    """Infer the number of prefix tokens from the entries that the head reads, if the model does not declare it."""
    if layout.ndim != 3 or layout.channels_first or _declared_prefix_tokens(model) is not None:
        return layout
    read = mask.nonzero().flatten().tolist()
    if len(read) < len(mask) and read == list(range(len(read))):  # the head reads class tokens
        return replace(layout, num_prefix_tokens=len(read))
    return replace(layout, num_prefix_tokens=read[0] if read else 0)


def _has_class_token(model: nn.Module, layouts: Sequence[Layout]) -> bool:
    if not all(layout.num_prefix_tokens for layout in layouts):
        return False
    if hasattr(model, 'has_class_token'):
        return bool(model.has_class_token)
    return getattr(model, 'cls_token', layouts) is not None


def _find_method(twin: nn.Module, head: Head, streams: Sequence[torch.Tensor]) -> str:
    """Return the cheapest method whose logits at every position of a constant map equal the logits of the map."""
    generator = torch.Generator('cpu').manual_seed(1)
    pairs = list(zip(streams, head.layouts, strict=True))
    vectors = [_random((3, stream.shape[layout.channel_axis]), generator) for stream, layout in pairs]
    whole = _run_head(twin, head.constant_maps(vectors, [layout.size(stream) for stream, layout in pairs]))
    try:
        single = _run_head(twin, head.constant_maps(vectors))
    except SHAPE_ERRORS:
        return 'whole'
    return 'single' if (single - whole).abs().max() <= TOLERANCE * whole.abs().max() else 'whole'


def _describe_head(model: nn.Module, twin: nn.Module, features: Features) -> Head:
    """Return the description of the head, without map_norm and resizes_images.

    The head of the copy runs on small maps, with random parameters and on the CPU. The model itself is not run, and the
    global random state is not changed. Only the shapes of the features are used.
    """
    shapes = [stream.shape for stream in as_streams(features)]
    empty = [torch.zeros(2, *shape[1:], device='meta') for shape in shapes]
    called = _called_modules(twin, empty if len(empty) > 1 else empty[0])
    names = _outermost(called)
    batch_norms = tuple(name for name, module in called.items() if isinstance(module, _BatchNorm))
    check_batch_norms(model, batch_norms)
    head = Head((), 'single', batch_norms=batch_norms, names=names, modules=modules_below(model, names))
    head = _find_layouts(twin, head, empty)
    window = _window(called)
    if window is not None:
        return replace(head, method='window', window=window)
    # Not only the modules that are called: nn.MultiheadAttention uses the weights of its last layer directly.
    parts = (f'{name}.{part}'.rstrip('.') for name in names for part, _ in twin.get_submodule(name).named_modules())
    twin = _with_random_values(model, twin, ['', *parts])
    generator = torch.Generator('cpu').manual_seed(2)
    streams = [_random((2, *shape[1:]), generator) for shape in shapes]
    masks = _read_mask(twin, head, streams)
    layouts = tuple(_resolve_prefix(twin, layout, mask) for layout, mask in zip(head.layouts, masks, strict=True))
    head = replace(
        head,
        layouts=layouts,
        reads_positions=not any(
            mask[:layout.num_prefix_tokens].any() for mask, layout in zip(masks, layouts, strict=True)),
        has_class_token=_has_class_token(twin, layouts))
    return replace(head, method=_find_method(twin, head, streams))


def _norm_behind_tokens(twin: nn.Module, image: torch.Tensor) -> str | None:
    """Return the name of the norm whose output forward_features returns, if the last map can be computed, or None."""
    outputs = {}

    def watch(name: str, module: nn.Module, output: torch.Tensor) -> None:
        if isinstance(module, nn.LayerNorm):
            outputs[name] = output

    with watching(twin, watch):
        features = twin.forward_features(image)
    names = [name for name, output in outputs.items() if output is features]
    if not names or not hasattr(twin, 'forward_intermediates'):
        return None
    last_map = twin.forward_intermediates(image, indices=1)[1][-1]
    return names[0] if last_map.ndim == 4 and last_map.shape[1] == features.shape[-1] else None


def _compare_sizes(twin: nn.Module, image: torch.Tensor, features: Sequence[torch.Tensor], head: Head) -> Head:
    """Determine which streams depend on the size of the image, with an image of twice the width."""
    try:
        wide = twin.forward_features(torch.cat([image, image], dim=-1))
    except SHAPE_ERRORS:
        return head
    follows = [after.shape != before.shape for after, before in zip(wide, features, strict=True)]
    if not any(follows):
        return replace(head, resizes_images=True)
    layouts = (replace(layout, has_positions=f) for layout, f in zip(head.layouts, follows, strict=True))
    return replace(head, layouts=tuple(layouts))


@torch.no_grad()
def find_head(model: nn.Module) -> Head:
    """Determine how to apply a model's head at every position. A copy of the model runs on one image.

    If forward_features returns class tokens only, positions are the output of forward_intermediates, normalized by the
    norm of the class token.

    Raises:
        ValueError: If the head cannot be applied at a position. The message gives the reason.
    """
    twin, image, features = run_example(model)
    name = type(model).__name__
    if not isinstance(features, (torch.Tensor, list, tuple)) or not all(
            isinstance(stream, torch.Tensor) and stream.ndim > 2 for stream in as_streams(features)):
        raise ValueError(
            f'{name}.forward_features returns neither a feature map nor a list of feature maps: attach with '
            "mode='pooled'.")
    head = _describe_head(model, twin, features)
    streams = as_streams(features)
    if all(min(layout.size(stream)) > 0 for layout, stream in zip(head.layouts, streams, strict=True)):
        return _compare_sizes(twin, image, features, head) if len(streams) > 1 else head
    norm = _norm_behind_tokens(twin, image)
    if norm is None:
        raise ValueError(
            f'{name}.forward_features returns class tokens only, and forward_intermediates gives no matching feature '
            "map: attach with mode='pooled'.")
    return replace(head, map_norm=norm)
