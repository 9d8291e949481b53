"""Where the positions are in a model's feature map: NCHW, NHWC, tokens with prefix tokens, lists of streams."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Features = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Axes of one feature tensor.

    Attributes:
        channels_first: Whether the channel axis follows the batch axis (NCHW, NCL) or comes last (NHWC, NLC).
        ndim: Number of axes, with those of batch and channels.
        num_prefix_tokens: Leading entries that are no positions: class, distillation and register tokens.
        has_positions: Whether the other entries are positions; not so for hidden states of a fixed number.
    """
    channels_first: bool
    ndim: int
    num_prefix_tokens: int = 0
    has_positions: bool = True

    def size(self, features: torch.Tensor) -> tuple[int, ...]:
        """Sizes of the position axes, without the prefix tokens."""
        size = features.shape[2:] if self.channels_first else features.shape[1:-1]
        if self.num_prefix_tokens:
            return (size[0] - self.num_prefix_tokens, *size[1:])
        return tuple(size)

    def positions(self, features: torch.Tensor) -> torch.Tensor:
        """Features at every position (b, r, d) in row-major order; a view wherever strides allow."""
        if self.channels_first:
            features = features.movedim(1, -1)
        return features.flatten(1, -2)[:, self.num_prefix_tokens:]

    def constant(self, vectors: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Feature maps whose positions, and prefix tokens, all hold the same vector.

        Args:
            vectors: The vector of each map (n, d).
            size: Sizes of the position axes.

        Returns:
            n feature maps in this layout.
        """
        size = (size[0] + self.num_prefix_tokens, *size[1:])
        if self.channels_first:
            return vectors.reshape(*vectors.shape, *[1] * len(size)).expand(*vectors.shape, *size)
        return vectors.reshape(vectors.shape[0], *[1] * len(size), vectors.shape[1]).expand(-1, *size, -1)


def as_streams(features: Features) -> tuple[torch.Tensor, ...]:
    """The tensors of a feature map: one, or one for each stream of a multi-scale model."""
    return (features,) if isinstance(features, torch.Tensor) else tuple(features)


def grid_size(num_positions: int, image_size: Sequence[int] | None) -> tuple[int, int]:
    """The height and width of num_positions tokens: the factors whose ratio is nearest to the image's, or to 1."""
    aspect = image_size[0] / image_size[1] if image_size else 1.0
    heights = (h for h in range(1, num_positions + 1) if num_positions % h == 0)
    height = min(heights, key=lambda h: abs(math.log(h * h / num_positions / aspect)))
    return height, num_positions // height


def _area_weights(size_in: int, size_out: int, like: torch.Tensor) -> torch.Tensor:
    """Share (out, in) of every input cell in every output cell, both grids spanning the same length."""
    edges_in = torch.arange(size_in + 1, device=like.device, dtype=torch.float32) / size_in
    edges_out = torch.arange(size_out + 1, device=like.device, dtype=torch.float32) / size_out
    low = torch.maximum(edges_in[None, :-1], edges_out[:-1, None])
    high = torch.minimum(edges_in[None, 1:], edges_out[1:, None])
    return ((high - low).clamp_min(0) * size_out).to(like.dtype)


def align_streams(streams: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Bring streams of several scales to the grid of the coarsest, each cell the mean over the area that it covers.

    The mean over a stream's positions stays what it was, also where the grids do not divide each other.

    Args:
        streams: Features at the positions of each stream (b, r_s, d_s).
        sizes: Height and width of each stream's grid.

    Returns:
        Features of each stream (b, r, d_s), r positions of the coarsest grid.
    """
    height, width = min(sizes, key=math.prod)
    aligned = []
    for stream, (h, w) in zip(streams, sizes, strict=True):
        if (h, w) != (height, width):
            rows, columns = _area_weights(h, height, stream), _area_weights(w, width, stream)
            stream = torch.einsum('ph,qw,bhwd->bpqd', rows, columns, stream.unflatten(1, (h, w))).flatten(1, 2)
        aligned.append(stream)
    return aligned
