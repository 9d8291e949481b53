"""Determine how to apply a model's head at every position, by running the head on small feature maps."""
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .blueprint import SHAPE_ERRORS, run_example, watching
from .head_norm import check_batch_norms
from .layouts import Features, Layout, as_streams

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Head:
    """Description of a head.

    Attributes:
        layouts: Layout of each stream of the features.
        method: How the head is applied at a position. 'single': forward_head on maps of one position. 'whole':
            forward_head on maps filled with the vector of the position, for heads that depend on the position.
            'window': forward_head on every window of the head's convolution.
        window: Height and width of the convolution, for 'window'.
        batch_norms: Module names of the BatchNorms in the head.
        reads_positions: Whether the prediction depends on the positions only, and not on a class token.
        has_class_token: Whether the first entry of each stream is a class token.
        map_norm: Module name of the norm after the last feature map, if forward_features returns class tokens only.
        resizes_images: Whether the model resizes all images to one size, so that the grid of positions is constant.
        names: Names of the outermost modules of the head.
        modules: These modules and their submodules at the time of inspection.
    """
    layouts: tuple[Layout, ...]
    method: str
    window: tuple[int, int] | None = None
    batch_norms: tuple[str, ...] = ()
    reads_positions: bool = True
    has_class_token: bool = False
    map_norm: str | None = None
    resizes_images: bool = False
    names: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether the head of the model still consists of the inspected modules."""
        if getattr(model, '_is_replica', False):  # nn.DataParallel copies modules in every forward pass
            return True
        try:
            return _modules_below(model, self.names) == self.modules
        except AttributeError:  # a module was removed
            return False

    def pack(self, streams: Sequence[torch.Tensor]) -> Features:
        """Convert the streams to the input of forward_head."""
        return list(streams) if len(streams) > 1 else streams[0]

    def constant_maps(self, vectors: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]] | None = None) -> Features:
        """Return constant maps of the given sizes, or of one position, for the vectors (n, d_s) of each stream."""
        sizes = sizes or [(1,) * (layout.ndim - 2) for layout in self.layouts]
        streams = zip(self.layouts, vectors, sizes, strict=True)
        return self.pack([layout.constant(vector, size) for layout, vector, size in streams])


def _modules_below(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """Return the named modules and their submodules."""
    return tuple(module for name in names for module in model.get_submodule(name).modules())


def mean_of_heads(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Average the outputs of a model with several heads, as distilled models do in evaluation mode."""
    return sum(output[1:], output[0]) / len(output) if isinstance(output, tuple) else output


def _called_modules(model: nn.Module, features: Features) -> dict[str, nn.Module]:
    """Return the modules that forward_head calls, by name, and the model itself."""
    called = {'': model}
    found = None
    try:
        with watching(model, lambda name, module, _: called.__setitem__(name, module)):
            output = mean_of_heads(model.forward_head(features))
        if output.ndim != 2:
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
        return mean_of_heads(twin.forward_head(features))


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
            if mean_of_heads(model.forward_head(head.constant_maps(vectors, sizes))).ndim == 2:
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


def _inspect(model: nn.Module, twin: nn.Module, features: Features) -> Head:
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
    head = Head((), 'single', batch_norms=batch_norms, names=names, modules=_modules_below(model, names))
    head = _find_layouts(twin, head, empty)
    window = _window(called)
    if window is not None:
        return replace(head, method='window', window=window)
    twin = _with_random_values(model, twin, called)
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
    head = _inspect(model, twin, features)
    streams = as_streams(features)
    if all(min(layout.size(stream)) > 0 for layout, stream in zip(head.layouts, streams, strict=True)):
        return _compare_sizes(twin, image, features, head) if len(streams) > 1 else head
    norm = _norm_behind_tokens(twin, image)
    if norm is None:
        raise ValueError(
            f'{name}.forward_features returns class tokens only, and forward_intermediates gives no matching feature '
            "map: attach with mode='pooled'.")
    return replace(head, map_norm=norm)
