"""Apply the head of a timm model at every position of its feature map."""
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .head_norm import restore_batch_norms, set_phase, swap_batch_norms
from .heads import Head, find_head, mean_of_heads
from .layouts import Features, align_streams, as_streams, grid_size

WHOLE_MAPS_AT_ONCE = 4


def _windows(features: torch.Tensor, window: Sequence[int]) -> torch.Tensor:
    """Return all windows of a map (b, d, h, w) at stride 1: (b, r, d, height, width)."""
    height, width = (min(size, limit) for size, limit in zip(window, features.shape[2:], strict=True))
    return features.unfold(2, height, 1).unfold(3, width, 1).flatten(2, 3).transpose(1, 2)


def position_features(
        head: Head,
        features: Features,
        image_size: Sequence[int] | None = None,
) -> list[torch.Tensor]:
    """Return the features (b, r, d_s) of each stream, positions in row-major order, the same r for all streams.

    Streams are resampled to the coarsest grid. A stream without positions has its mean at all positions. The image size
    is used to align several streams of tokens. None means square.
    """
    streams = as_streams(features)
    if head.method == 'window':
        return [_windows(streams[0], head.window).flatten(2)]
    positions = [layout.positions(stream) for stream, layout in zip(streams, head.layouts, strict=True)]
    if min(p.shape[1] for p in positions) == 0:
        raise ValueError(
            'The features are class tokens only. dense_logits does not support such a model: use attach().')
    if len(positions) == 1:
        return positions
    placed = [i for i, layout in enumerate(head.layouts) if layout.has_positions]
    sizes = [head.layouts[i].size(streams[i]) for i in placed]
    image_size = None if head.resizes_images else image_size
    sizes = [size if len(size) == 2 else grid_size(size[0], image_size) for size in sizes]
    for i, aligned in zip(placed, align_streams([positions[i] for i in placed], sizes), strict=True):
        positions[i] = aligned
    num_positions = positions[placed[0]].shape[1]
    return [
        stream if layout.has_positions else stream.mean(1, keepdim=True).expand(-1, num_positions, -1)
        for stream, layout in zip(positions, head.layouts, strict=True)]


def _constant_map_logits(
        model: nn.Module,
        head: Head,
        positions: Sequence[torch.Tensor],
        sizes: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """Return logits (b, r, c) of constant maps, one map of the given sizes or of one position for each position."""
    maps = head.constant_maps([vectors.flatten(0, 1) for vectors in positions], sizes)
    return mean_of_heads(model.forward_head(maps)).unflatten(0, positions[0].shape[:2])


def _whole_map_logits(
        model: nn.Module,
        head: Head,
        streams: Sequence[torch.Tensor],
        positions: Sequence[torch.Tensor],
) -> torch.Tensor:
    # There is one map for each position, as large as the features. Checkpointing and chunks limit the memory.
    sizes = [layout.size(stream) for stream, layout in zip(streams, head.layouts, strict=True)]
    logits = []
    for chunk in zip(*(vectors.split(WHOLE_MAPS_AT_ONCE, dim=1) for vectors in positions), strict=True):
        if head.batch_norms:  # the batch statistics are not available in the backward pass
            logits.append(_constant_map_logits(model, head, chunk, sizes))
        else:
            logits.append(checkpoint(_constant_map_logits, model, head, chunk, sizes, use_reentrant=False))
    return torch.cat(logits, dim=1)


def position_logits(
        model: nn.Module,
        head: Head,
        features: Features,
        positions: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the logits (b, r, c) of the head at every position, for the output of position_features.

    For a head with BatchNorm in training mode, the statistics of the pooled batch must be recorded (see head_norm).
    """
    streams = as_streams(features)
    if head.method == 'window':
        maps = _windows(streams[0], head.window)
        return mean_of_heads(model.forward_head(maps.flatten(0, 1))).unflatten(0, maps.shape[:2])
    if head.method == 'whole':
        return _whole_map_logits(model, head, streams, positions)
    return _constant_map_logits(model, head, positions)


def dense_logits(
        model: nn.Module,
        features: Features,
        image_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute the logits of a timm model at every position of its feature map.

    On a constant feature map, the logits at every position equal the output of forward_head. If the head is average
    pooling and an affine classifier, the mean of the logits over positions equals the output of forward_head. Dropout
    in the head draws a mask for each position. In training mode, BatchNorm in the head uses the statistics of the
    pooled batch, and the running statistics are not updated. If the model is not attached, every call inspects the
    head: attach the model in a training loop.

    Args:
        model: A timm model, or a model with timm's forward_features and forward_head.
        features: Output of model.forward_features(images).
        image_size: Height and width of the images. Required only for multi-scale models that return tokens, if images
            are not square.

    Returns:
        Logits (b, r, c), positions in row-major order.

    Raises:
        TypeError: If the model does not have forward_features and forward_head.
        ValueError: If the head cannot be applied at a position. The message gives the reason.
    """
    check_protocol(model)
    head = getattr(getattr(model, '_multimix', None), 'head', None)
    if head is None or not head.belongs_to(model):
        head = find_head(model)
    positions = position_features(head, features, image_size)
    if not head.batch_norms or not model.training:
        return position_logits(model, head, features, positions)
    attached = hasattr(model.get_submodule(head.batch_norms[0]), '_multimix_statistics')
    swap_batch_norms(model, head.batch_norms)
    try:
        set_phase(model, head.batch_norms, 'measure')
        model.forward_head(features)
        set_phase(model, head.batch_norms, 'apply')
        return position_logits(model, head, features, positions)
    finally:
        set_phase(model, head.batch_norms, None)
        if not attached:
            restore_batch_norms(model)


def check_protocol(model: nn.Module) -> None:
    """Raise TypeError if the model does not follow timm's protocol, and ValueError if it has no classifier."""
    # A compiled model forwards attribute access, so it seems to have both methods.
    is_compiled = isinstance(getattr(model, '_orig_mod', None), nn.Module)
    if is_compiled or not all(callable(getattr(model, name, None)) for name in ('forward_features', 'forward_head')):
        raise TypeError(
            f"{type(model).__name__} does not have timm's forward_features and forward_head. Attach before you wrap "
            'the model for compilation or distribution. For models of other libraries use pooled MultiMix: pass the '
            'logits (b, c) to MultiMixLoss.')
    classifier = model.get_classifier() if callable(getattr(model, 'get_classifier', None)) else None
    if getattr(model, 'num_classes', None) == 0 or isinstance(classifier, nn.Identity):
        raise ValueError(
            f'{type(model).__name__} has no classifier (num_classes=0): create it with the number of classes, '
            'or call reset_classifier.')
