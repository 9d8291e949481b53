"""What a model's head is, found by running it on small feature maps, never by its name."""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .blueprint import blueprint, run_example, watching
from .layouts import Features, Layout, as_streams

TOLERANCE = 1e-4
# what modules raise on input of a shape that they do not take
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


@dataclass(frozen=True)
class Head:
    """How a head is applied at every position.

    Attributes:
        layouts: Layout of each stream of the features.
        as_list: Whether forward_head takes a list of streams.
        method: 'classifier' (the classifier is all there is after pooling: one matrix product), 'single' (forward_head
            on one-position maps), 'whole' (forward_head on maps that hold the position's vector everywhere, for heads
            that treat positions differently), or 'window' (forward_head on every window of the head's convolution).
        classifier: Module name of the classifier, for 'classifier'.
        window: Height and width of the convolution, for 'window'.
        batch_norms: Module names of the BatchNorms in the head.
        dropouts: Module names of the dropouts in the head.
        reads_positions: Whether the prediction comes from the positions alone, without a class token's help.
        has_class_token: Whether the first entry of each stream is a class token.
        map_norm: Module name of the norm behind the last feature map, if forward_features returns tokens only.
        resizes_images: Whether the model brings images to one size itself, so that all have the same grid of positions.
        names: Names of the outermost modules of the head.
        modules: These modules and all modules inside them, when the head was inspected.
    """
    layouts: tuple[Layout, ...]
    as_list: bool
    method: str
    classifier: str | None = None
    window: tuple[int, int] | None = None
    batch_norms: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    reads_positions: bool = True
    has_class_token: bool = False
    map_norm: str | None = None
    resizes_images: bool = False
    names: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether the model's head still consists of the modules that were inspected."""
        if getattr(model, '_is_replica', False):  # nn.DataParallel copies modules in every forward pass
            return True
        try:
            modules = _modules_below(model, self.names)
        except AttributeError:  # one of the names does not exist any more
            return False
        return len(modules) == len(self.modules) and all(
            module is inspected for module, inspected in zip(modules, self.modules, strict=True))

    def pack(self, streams: Sequence[torch.Tensor]) -> Features:
        """The streams in the form that forward_head takes."""
        return list(streams) if self.as_list else streams[0]


def _modules_below(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """The named modules and all modules inside them."""
    return tuple(module for name in names for module in model.get_submodule(name).modules())


def mean_of_heads(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The mean of a distilled model's two heads, which it predicts with in evaluation; a tensor stays as it is."""
    return sum(output) / len(output) if isinstance(output, tuple) else output


def _called_modules(model: nn.Module, features: Features) -> dict[str, nn.Module]:
    """Modules that forward_head calls, by name; the model itself among them, for parameters of its own.

    Raises:
        ValueError: if the output is not logits (b, c).
    """
    called = {'': model}
    found = None
    try:
        with watching(model, lambda name, module, _: called.__setitem__(name, module)):
            output = mean_of_heads(model.forward_head(features))
        if output.ndim != 2:
            found = f'shape {tuple(output.shape)}'
    except REFUSALS as error:
        found = f'an error: {error}'
    if found is not None:
        raise ValueError(
            f'{type(model).__name__}.forward_head must give logits (b, c) for what forward_features returns, and gave '
            f"{found}. Create the model with a classifier and with pooling (not with global_pool='').")
    return called


def _outermost(names: Iterable[str]) -> tuple[str, ...]:
    """The names of modules that are in no other of the named modules, without the model itself."""
    names = [name for name in names if name]
    return tuple(name for name in names if not any(name.startswith(f'{other}.') for other in names))


def _random_values(model: nn.Module, called: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Random values for what the called modules hold, so that initial zeros and ones hide nothing; on the CPU."""
    generator = torch.Generator('cpu').manual_seed(0)
    values = {}
    for prefix, module in called.items():
        for name, parameter in module.named_parameters(recurse=False):
            scale, offset = (parameter[0].numel() ** -0.5, 0.0) if parameter.ndim > 1 else (0.5, 0.5)
            value = _random(parameter.shape, generator) * scale + offset
            values[f'{prefix}.{name}'.removeprefix('.')] = value
        for name, _ in module.named_buffers(recurse=False):
            name = f'{prefix}.{name}'.removeprefix('.')
            buffer = model.get_buffer(name)
            if isinstance(module, _BatchNorm) and buffer.is_floating_point():
                values[name] = _random(buffer.shape, generator).square() + 0.5
            else:
                value = torch.zeros_like(buffer, device='cpu') if buffer.is_meta else buffer.cpu()
                values[name] = value.float() if value.is_floating_point() else value
    return values


def _random(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device='cpu', dtype=torch.float32)


class _RandomHead(nn.Module):
    """forward_head with other values in place of the parameters and buffers."""

    def __init__(self, model: nn.Module, values: dict[str, torch.Tensor]):
        super().__init__()
        self.model = model
        self.values = {f'model.{name}': value for name, value in values.items()}

    def forward(self, features: Features) -> torch.Tensor:
        return mean_of_heads(self.model.forward_head(features))

    def run(self, features: Features) -> torch.Tensor:
        return torch.func.functional_call(self, self.values, (features,))


def _declared_prefix_tokens(model: nn.Module) -> int | None:
    if getattr(model, 'num_prefix_tokens', None) is not None:
        return int(model.num_prefix_tokens)
    token = getattr(model, 'cls_token', None)
    return token.shape[-2] if isinstance(token, torch.Tensor) and token.ndim > 1 else None


def _find_layouts(model: nn.Module, streams: Sequence[torch.Tensor], as_list: bool) -> tuple[Layout, ...]:
    """Which axis holds the channels: the one that the head does not let us shorten."""
    prefix = _declared_prefix_tokens(model) or 0
    channels_first_orders = (False, True)
    if streams[0].ndim > 3 and getattr(model, 'output_fmt', None) != 'NHWC':
        channels_first_orders = (True, False)
    errors = []
    for channels_first in channels_first_orders:
        layouts = tuple(
            Layout(channels_first, stream.ndim, prefix if stream.ndim == 3 and not channels_first else 0)
            for stream in streams)
        short = []
        for stream, layout in zip(streams, layouts, strict=True):
            width = stream.shape[1 if channels_first else -1]
            # two tokens, as an undeclared class token and one position, or two distillation tokens
            size = (2,) if stream.ndim == 3 else (1,) * (stream.ndim - 2)
            short.append(layout.constant(stream.new_zeros(2, width), size))
        try:
            if mean_of_heads(model.forward_head(short if as_list else short[0])).ndim == 2:
                return layouts
        except REFUSALS as error:
            errors.append(str(error))
    shapes = ', '.join(str(tuple(stream.shape)) for stream in streams)
    raise ValueError(
        f"Dense MultiMix found no way to run {type(model).__name__}.forward_head on a smaller map of its features "
        f"{shapes}: attach with mode='pooled'. {' / '.join(errors)}")


def _window(modules: dict[str, nn.Module]) -> tuple[int, int] | None:
    """Size of an unpadded convolution that slides over the map before it is pooled."""
    for module in modules.values():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and max(module.padding) == 0:
            return tuple(module.kernel_size)
    return None


def _read_mask(run: _RandomHead, head: Head, streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each stream, which entries (r,) along the position axes the prediction depends on."""
    with torch.enable_grad():
        inputs = [stream.clone().requires_grad_() for stream in streams]
        gradients = torch.autograd.grad(run.run(head.pack(inputs)).square().sum(), inputs, allow_unused=True)
    masks = []
    for gradient, stream, layout in zip(gradients, streams, head.layouts, strict=True):
        gradient = torch.zeros_like(stream) if gradient is None else gradient
        flat = gradient.movedim(1, -1) if layout.channels_first else gradient
        masks.append(flat.flatten(1, -2).abs().amax((0, 2)) > 0)
    return masks


def _resolve_prefix(model: nn.Module, layout: Layout, mask: torch.Tensor) -> Layout:
    """The layout with the number of prefix tokens that a model does not declare, from what its head reads."""
    if layout.ndim != 3 or layout.channels_first or _declared_prefix_tokens(model) is not None:
        return layout
    read = mask.nonzero().flatten().tolist()
    if getattr(model, 'global_pool', None) == 'token':
        num_prefix_tokens = len(read) if read == list(range(len(read))) and len(read) < len(mask) else 1
    else:
        num_prefix_tokens = read[0] if read else 0
    return replace(layout, num_prefix_tokens=num_prefix_tokens)


def _has_class_token(model: nn.Module, layouts: Sequence[Layout]) -> bool:
    if not all(layout.num_prefix_tokens for layout in layouts):
        return False
    if hasattr(model, 'has_class_token'):
        return bool(model.has_class_token)
    return getattr(model, 'cls_token', layouts) is not None


def _classifier_name(model: nn.Module, channels_first: bool) -> str | None:
    """Module name of the classifier, if it is one affine map that takes features of this layout."""
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    is_linear = isinstance(classifier, nn.Linear)
    is_conv = isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1) and channels_first
    if not is_linear and not is_conv:
        return None
    return next((name for name, module in model.named_modules() if module is classifier), None)


def _close(output: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((output - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _find_method(
        model: nn.Module,
        run: _RandomHead,
        head: Head,
        streams: Sequence[torch.Tensor],
) -> Head:
    """The cheapest method that gives a constant map, at every position, what the head gives for the whole of it."""
    generator = torch.Generator('cpu').manual_seed(1)
    pairs = list(zip(streams, head.layouts, strict=True))
    vectors = [_random((3, s.shape[1 if lay.channels_first else -1]), generator) for s, lay in pairs]
    whole = run.run(head.pack([
        layout.constant(vector, layout.size(stream)) for vector, (stream, layout) in zip(vectors, pairs, strict=True)]))
    try:
        single = run.run(head.pack([
            layout.constant(vector, (1,) * len(layout.size(stream)))
            for vector, (stream, layout) in zip(vectors, pairs, strict=True)]))
    except REFUSALS:
        return replace(head, method='whole')
    if not _close(single, whole):
        return replace(head, method='whole')
    name = _classifier_name(model, head.layouts[0].channels_first and head.layouts[0].ndim == 4)
    if name is not None and len(streams) == 1:
        weight, bias = run.values.get(f'model.{name}.weight'), run.values.get(f'model.{name}.bias')
        fits = weight is not None and weight[0].numel() == vectors[0].shape[1]
        if fits and _close(F.linear(vectors[0], weight.flatten(1), bias), single):
            return replace(head, method='classifier', classifier=name)
    return replace(head, method='single')


@torch.no_grad()
def inspect_head(model: nn.Module, features: Features, twin: nn.Module | None = None) -> Head:
    """Find out how to apply a model's head at every position.

    The head of a copy runs on small maps, with random parameters and on the CPU. The model itself is not run, and the
    global random state stays as it is.

    Args:
        model: A model with timm's forward_head.
        features: What its forward_features returns, from which only the shapes are read.
        twin: A copy of the model in evaluation mode; its blueprint if None.

    Returns:
        The description that position_logits takes.

    Raises:
        ValueError: if the head cannot be applied at a position, with the reason.
    """
    twin = blueprint(model) if twin is None else twin
    shapes = [stream.shape for stream in as_streams(features)]
    parameter = next(twin.parameters())
    empty = [torch.zeros(2, *shape[1:], device=parameter.device, dtype=parameter.dtype) for shape in shapes]
    head = Head(layouts=(), as_list=not isinstance(features, torch.Tensor), method='single')
    called = _called_modules(twin, head.pack(empty))
    names = _outermost(called)
    head = replace(
        head,
        names=names,
        modules=_modules_below(model, names),
        layouts=_find_layouts(twin, empty, head.as_list),
        batch_norms=tuple(name for name, module in called.items() if isinstance(module, _BatchNorm)),
        dropouts=tuple(name for name, module in called.items() if isinstance(module, _DropoutNd)))
    window = _window(called)
    if window is not None:
        return replace(head, method='window', window=window)
    run = _RandomHead(twin, _random_values(model, called))
    generator = torch.Generator('cpu').manual_seed(2)
    with torch.autocast('cpu', enabled=False):
        streams = [_random((2, *shape[1:]), generator) for shape in shapes]
        masks = _read_mask(run, head, streams)
        layouts = tuple(_resolve_prefix(twin, layout, mask) for layout, mask in zip(head.layouts, masks, strict=True))
        prefixes = [mask[:layout.num_prefix_tokens] for mask, layout in zip(masks, layouts, strict=True)]
        head = replace(
            head,
            layouts=layouts,
            reads_positions=not any(prefix.any() for prefix in prefixes),
            has_class_token=_has_class_token(twin, layouts))
        return _find_method(twin, run, head, streams)


def _norm_behind_tokens(twin: nn.Module, image: torch.Tensor) -> str | None:
    """Module name of the norm whose output forward_features returns, if the model keeps the last map before it."""
    outputs = {}

    def watch(name, module, output):
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
    """Tell streams that follow the size of the image from those that do not, by an image twice as wide."""
    try:
        wide = twin.forward_features(torch.cat([image, image], dim=-1))
    except REFUSALS:
        return head
    follows = [after.shape != before.shape for after, before in zip(wide, features, strict=True)]
    if not any(follows):
        return replace(head, resizes_images=True)
    layouts = (replace(layout, has_positions=f) for layout, f in zip(head.layouts, follows, strict=True))
    return replace(head, layouts=tuple(layouts))


@torch.no_grad()
def find_head(model: nn.Module) -> Head:
    """Find out how to apply a model's head at every position, from the model alone.

    A model whose features are class tokens only gets its positions from forward_intermediates, through the norm that
    the class token went through.

    Args:
        model: A model with timm's forward_features and forward_head.

    Returns:
        The description that position_logits takes.

    Raises:
        ValueError: if the head cannot be applied at a position, with the reason.
    """
    twin, image, features = run_example(model)
    name = type(model).__name__
    if not isinstance(features, (torch.Tensor, list, tuple)) or not all(
            isinstance(stream, torch.Tensor) and stream.ndim > 2 for stream in as_streams(features)):
        raise ValueError(
            f'{name}.forward_features returns neither a feature map nor a list of them, so where its positions are is '
            "unknown: attach with mode='pooled'.")
    head = inspect_head(model, features, twin)
    streams = as_streams(features)
    if all(min(layout.size(stream)) > 0 for layout, stream in zip(head.layouts, streams, strict=True)):
        return _compare_sizes(twin, image, features, head) if len(streams) > 1 else head
    norm = _norm_behind_tokens(twin, image)
    if norm is None:
        raise ValueError(
            f'{name}.forward_features returns class tokens only, and its positions cannot be reached: '
            "attach with mode='pooled'.")
    return replace(head, map_norm=norm)
