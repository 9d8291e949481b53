"""Feature pyramids on timm backbones: FPN, or ViTDet's simple pyramid for models with one resolution."""
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork

from ..common.errors import UsageError, usage_errors

_GROUPS = 32  # groups of the group normalization in the pyramid and in torchvision's heads
_USUAL_STRIDE = 32  # largest stride of most models
_LARGEST_MEASURED = 1024  # largest side of the image that strides are measured with, in pixels


class Level(NamedTuple):
    """Feature maps of one resolution: stride in pixels, indices of the maps, and the sum of their channels."""
    stride: int
    maps: tuple[int, ...]
    channels: int


def _maps(features: nn.Module, size: tuple[int, int], in_chans: int) -> list[torch.Tensor]:
    """Return the feature maps (1, c, h, w) of a zero image, or raise UsageError."""
    channels = features.feature_info.channels()
    with usage_errors(f'The model does not accept images of {size[0]} x {size[1]} pixels'), torch.no_grad():
        maps = features.eval()(torch.zeros(1, in_chans, *size))
    if [one.shape[1] for one in maps if one.ndim == 4] != channels:
        shapes = ', '.join(str(tuple(one.shape)) for one in maps)
        raise UsageError(f'The model has feature maps {shapes}, not (1, c, height, width) with c = {channels}.')
    return maps


def measure_levels(features: nn.Module, input_size: tuple[int, int, int]) -> list[Level]:
    """Group the maps of a feature extractor by stride. Strides are measured, because some models report wrong ones.

    `input_size` is the size (channels, height, width) of the images that the model was trained on.
    """
    in_chans, *native = input_size
    even = [math.lcm(side, _USUAL_STRIDE) for side in native]
    size = tuple(native if max(even) > _LARGEST_MEASURED else even)
    maps = _maps(features, size, in_chans)
    found: dict[int, list[int]] = {}
    for index, one in enumerate(maps):
        stride = round(size[0] / one.shape[2])
        found.setdefault(stride, []).append(index)
    if len(found) == 1:  # a plain ViT, whose last map is the output of all layers
        found = {stride: indices[-1:] for stride, indices in found.items()}
    return [Level(stride, tuple(indices), sum(maps[index].shape[1] for index in indices))
            for stride, indices in sorted(found.items())]


def check_size(features: nn.Module, levels: list[Level], size: tuple[int, int], in_chans: int) -> None:
    """Raise UsageError unless the feature maps of images of a size have the strides of their levels."""
    maps = _maps(features, size, in_chans)
    for stride, index in ((level.stride, index) for level in levels for index in level.maps):
        shape, expected = tuple(maps[index].shape[2:]), tuple(side // stride for side in size)
        if shape != expected:
            raise UsageError(
                f'Images of {size[0]} x {size[1]} pixels give a feature map of {shape[0]} x {shape[1]} positions, not '
                f'{expected[0]} x {expected[1]} as for a stride of {stride}. Boxes cannot be located exactly.')


class SimplePyramid(nn.Module):
    """Simple feature pyramid of ViTDet (Li et al., 2022), which computes several resolutions from one feature map.

    Levels have 1/4, 1/2, 1 and 2 times the stride of the map. Strides that are not integers, and strides below
    `min_stride` except for the last one, are left out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, min_stride: int):
        super().__init__()
        half, quarter = in_channels // 2, in_channels // 4
        scales = {
            0.25: (quarter, [
                nn.ConvTranspose2d(in_channels, half, 2, 2), LayerNorm2d(half), nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2)]),
            0.5: (half, [nn.ConvTranspose2d(in_channels, half, 2, 2)]),
            1: (in_channels, []),
            2: (in_channels, [nn.MaxPool2d(2)]),
        }
        scales = {scale: parts for scale, parts in scales.items()
                  if float(scale * stride).is_integer() and (scale * stride >= min_stride or scale == 2)}
        self.strides = [int(scale * stride) for scale in scales]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *resize, nn.Conv2d(channels, out_channels, 1, bias=False), LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels))
            for channels, resize in scales.values())

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [level(x) for level in self.levels]


class PyramidBackbone(nn.Module):
    """Backbone of timm with a feature pyramid, for torchvision's detectors.

    Maps of one level are concatenated. BatchNorm always uses its running statistics. A frozen backbone does not change.

    Args:
        features: timm's feature extractor.
        levels: Result of measure_levels.
        out_channels: Channels of each level of the pyramid, a multiple of 32.
        min_size: Shorter side of the images. Coarser levels are added up to the size of the images.
        frozen: Whether the backbone is not trained.
        min_stride: Finest stride of the pyramid.

    Attributes:
        strides: Stride of each level.
        num_own_levels: Number of levels without the added ones.
    """

    def __init__(
            self, features: nn.Module, levels: list[Level], out_channels: int, min_size: int, frozen: bool,
            min_stride: int):
        super().__init__()
        self.features = features.requires_grad_(not frozen)
        self.levels = [level for level in levels if level.stride >= min_stride or level is levels[-1]]
        self.out_channels = out_channels
        self.frozen = frozen
        if len(levels) == 1:
            self.pyramid = SimplePyramid(levels[0].channels, out_channels, levels[0].stride, min_stride)
            self.strides = list(self.pyramid.strides)
        else:
            self.pyramid = FeaturePyramidNetwork(
                [level.channels for level in self.levels], out_channels,
                norm_layer=lambda channels: nn.GroupNorm(_GROUPS, channels))
            self.strides = [level.stride for level in self.levels]
        self.num_own_levels = len(self.strides)
        while 8 * self.strides[-1] < min_size:
            self.strides.append(2 * self.strides[-1])

    def train(self, mode: bool = True) -> 'PyramidBackbone':
        super().train(mode)
        if self.frozen:
            self.features.eval()
        for module in self.features.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images: torch.Tensor) -> 'OrderedDict[str, torch.Tensor]':
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.features(images)
        merged = [torch.cat([maps[index] for index in level.maps], dim=1) for level in self.levels]
        if isinstance(self.pyramid, SimplePyramid):
            outputs = self.pyramid(merged[0])
        else:
            outputs = list(self.pyramid(OrderedDict(enumerate(merged))).values())
        while len(outputs) < len(self.strides):
            outputs.append(F.max_pool2d(outputs[-1], 1, 2))
        # Anchors have the dtype of the maps, and bfloat16 cannot represent all positions in a large image.
        return OrderedDict((str(index), one.float()) for index, one in enumerate(outputs))
