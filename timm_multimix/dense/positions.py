"""Apply the head of a timm model at every position of its feature map.

`Layout` describes the axes of a feature tensor and `Head` how a head is applied. heads.py determines both for a model.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

WHOLE_MAPS_AT_ONCE = 4

Features = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Axes of one feature tensor.

    Attributes:
        channels_first: Whether the channel axis follows the batch axis (NCHW, NCL) or comes last (NHWC, NLC).
        ndim: Number of axes, including batch and channels.
        num_prefix_tokens: Number of leading entries that are not positions: class, distillation and register tokens.
        has_positions: Whether the other entries are positions. False for a fixed number of hidden states.
    """
    channels_first: bool
    ndim: int
    num_prefix_tokens: int = 0
    has_positions: bool = True

    @property
    def channel_axis(self) -> int:
        return 1 if self.channels_first else -1

    def size(self, features: torch.Tensor) -> tuple[int, ...]:
        """Return the sizes of the position axes, without prefix tokens."""
        _, first, *others = features.movedim(self.channel_axis, -1).shape[:-1]
        return first - self.num_prefix_tokens, *others

    def positions(self, features: torch.Tensor) -> torch.Tensor:
        """Return the features at every position (b, r, d) in row-major order, as a view if possible."""
        return features.movedim(self.channel_axis, -1).flatten(1, -2)[:, self.num_prefix_tokens:]

    def constant(self, vectors: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Return a map of this size for each of n vectors (n, d). The vector is at all positions and prefix tokens."""
        size = (size[0] + self.num_prefix_tokens, *size[1:])
        maps = vectors.reshape(len(vectors), *[1] * len(size), vectors.shape[1]).expand(-1, *size, -1)
        return maps.movedim(-1, self.channel_axis)


def as_streams(features: Features) -> tuple[torch.Tensor, ...]:
    """Return the feature tensors: one, or one for each stream of a multi-scale model."""
    return (features,) if isinstance(features, torch.Tensor) else tuple(features)


def grid_size(num_positions: int, image_size: Sequence[int] | None) -> tuple[int, int]:
    """Return the height and width of a grid of tokens whose aspect ratio is closest to the image's, or to 1."""
    aspect = image_size[0] / image_size[1] if image_size else 1.0
    heights = (h for h in range(1, num_positions + 1) if num_positions % h == 0)
    height = min(heights, key=lambda h: abs(math.log(h * h / num_positions / aspect)))
    return height, num_positions // height


def align_streams(streams: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Average-pool streams (b, r_s, d_s), with grids of these sizes, to the coarsest grid: (b, r, d_s)."""
    coarsest = min(sizes, key=math.prod)
    maps = (stream.unflatten(1, size).movedim(-1, 1) for stream, size in zip(streams, sizes, strict=True))
    return [F.adaptive_avg_pool2d(stream, coarsest).flatten(2).mT for stream in maps]


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
            return modules_below(model, self.names) == self.modules
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


def modules_below(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """Return the named modules and their submodules."""
    return tuple(module for name in names for module in model.get_submodule(name).modules())


def mean_of_heads(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Average the outputs of a model with several heads, as distilled models do in evaluation mode."""
    return sum(output[1:], output[0]) / len(output) if isinstance(output, tuple) else output


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
