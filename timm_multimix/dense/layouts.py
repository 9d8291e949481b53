"""Layouts of feature maps: NCHW, NHWC, tokens with prefix tokens, and lists of streams."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
