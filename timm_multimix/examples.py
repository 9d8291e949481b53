"""Run a model on one image, to see what its features are and whether positions can be reached in them."""
from dataclasses import replace

import torch
from torch import nn

from .heads import Head, evaluating, inspect_head, watching
from .layouts import Features, as_streams

# two by two positions at the coarsest stride in use, 64; models that are fixed in size refuse it at once
SMALL_IMAGE = 128


def _image_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """A small size, those that the model says it takes, then common ones."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    sizes = [
        SMALL_IMAGE, getattr(model, 'img_size', None), getattr(getattr(model, 'patch_embed', None), 'img_size', None),
        (config.get('input_size') or ())[-2:], 224, 256, 32]
    sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes if size]
    return [size for size in dict.fromkeys(sizes) if len(size) == 2]


@torch.no_grad()
def run_example(model: nn.Module) -> tuple[torch.Tensor, Features]:
    """Run forward_features on one grey image, in evaluation mode.

    Args:
        model: A model with timm's forward_features.

    Returns:
        The image (1, 3, h, w) and the features.

    Raises:
        ValueError: if it runs at no size tried: 128, those that the model declares, 224, 256 and 32.
    """
    parameter = next(model.parameters())
    channels = getattr(model, 'in_chans', None) or next((p.shape[1] for p in model.parameters() if p.ndim == 4), 3)
    errors = []
    with evaluating(model):
        for size in _image_sizes(model):
            image = parameter.new_zeros(1, channels, *size)
            try:
                return image, model.forward_features(image)
            except (RuntimeError, ValueError, AssertionError) as error:
                errors.append(f'{size[0]} x {size[1]}: {error}')
    raise ValueError(
        f'{type(model).__name__}.forward_features ran at no image size tried, so its features are unknown. Set '
        f'model.img_size to the size it takes. {"; ".join(errors)}')


@torch.no_grad()
def _norm_behind_tokens(model: nn.Module, image: torch.Tensor) -> str | None:
    """Module name of the norm whose output forward_features returns, if the model keeps the last map before it."""
    outputs = {}

    def watch(name, module, output):
        if isinstance(module, nn.LayerNorm):
            outputs[name] = output

    with evaluating(model):
        with watching(model, watch):
            features = model.forward_features(image)
        names = [name for name, output in outputs.items() if output is features]
        if not names or not hasattr(model, 'forward_intermediates'):
            return None
        maps = model.forward_intermediates(image, indices=1)[1]
    return names[0] if maps[-1].ndim == 4 and maps[-1].shape[1] == features.shape[-1] else None


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
    image, features = run_example(model)
    streams = as_streams(features)
    if not all(isinstance(stream, torch.Tensor) for stream in streams):
        raise ValueError(
            f"{type(model).__name__}.forward_features returns {type(features).__name__}, not a tensor or a list of "
            "tensors, so where its positions are is unknown: attach with mode='pooled'.")
    head = inspect_head(model, features)
    if all(min(layout.size(stream)) > 0 for layout, stream in zip(head.layouts, streams, strict=True)):
        return head
    name = _norm_behind_tokens(model, image)
    if name is None:
        raise ValueError(
            f'{type(model).__name__}.forward_features returns class tokens only, and its positions cannot be reached: '
            "attach with mode='pooled'.")
    return replace(head, map_norm=name)
