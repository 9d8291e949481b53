"""torchvision's detectors on a timm backbone."""
import math

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import MultiScaleRoIAlign, box_area

from ..common.errors import UsageError
from .backbones import Source
from .pyramid import Level, PyramidBackbone, check_size, measure_levels

# Each detector with the finest stride of its pyramid, as in the papers.
DETECTORS = dict(fcos=8, fasterrcnn=4)
_SCORE_THRESHOLD = 1e-3  # torchvision's 0.2 and 0.05 cut off the end of the precision-recall curve
_ASPECT_RATIOS = (0.5, 1.0, 2.0)
_BOX_PER_STRIDE = 14  # FPN (Lin et al., 2017), equation 1: boxes of 224 pixels belong to stride 16


class _LevelOfBox:
    """FPN's rule for the level that a box is pooled from, for levels of any strides."""

    def __init__(self, strides: list[int]):
        self.strides = torch.tensor(strides)

    def __call__(self, boxes: list[torch.Tensor]) -> torch.Tensor:
        sizes = torch.cat([box_area(one) for one in boxes]).sqrt()
        fits = sizes[:, None] >= _BOX_PER_STRIDE * self.strides.to(sizes.device)
        return (fits.sum(dim=1) - 1).clamp(min=0)


def _roi_align(backbone: PyramidBackbone) -> MultiScaleRoIAlign:
    strides = backbone.strides[:backbone.num_own_levels]
    align = MultiScaleRoIAlign([str(index) for index in range(len(strides))], output_size=7, sampling_ratio=2)
    align.scales = [1 / stride for stride in strides]  # torchvision would round them to powers of 2
    align.map_levels = _LevelOfBox(strides)
    return align


def build_detector(
        kind: str,
        backbone: PyramidBackbone,
        num_classes: int,
        source: Source,
        image_bounds: tuple[int, int],
        head_convs: int,
) -> nn.Module:
    """A detector with a new head.

    Args:
        kind: 'fcos' or 'fasterrcnn'.
        backbone: The backbone.
        num_classes: Number of classes without the background.
        source: The model of the backbone: it knows the pixel statistics.
        image_bounds: torchvision's min_size and max_size.
        head_convs: Convolutions before the last one in the head of FCOS.

    Returns:
        A module as torchvision's: losses in training mode, predictions in evaluation mode.
    """
    min_size, max_size = image_bounds
    options = dict(
        num_classes=num_classes + 1, min_size=min_size, max_size=max_size, image_mean=list(source.mean),
        image_std=list(source.std), size_divisible=math.lcm(*backbone.strides))
    if kind == 'fcos':
        anchors = AnchorGenerator(tuple((stride,) for stride in backbone.strides), ((1.0,),) * len(backbone.strides))
        head = FCOSHead(backbone.out_channels, 1, num_classes + 1, head_convs)
        return FCOS(backbone, anchor_generator=anchors, head=head, score_thresh=_SCORE_THRESHOLD, **options)
    sizes = tuple((4 * stride, round(4 * math.sqrt(2) * stride)) for stride in backbone.strides)
    return FasterRCNN(
        backbone, rpn_anchor_generator=AnchorGenerator(sizes, (_ASPECT_RATIOS,) * len(sizes)),
        box_roi_pool=_roi_align(backbone), box_score_thresh=_SCORE_THRESHOLD, **options)


def input_shapes(sizes: list[tuple[int, int]], bounds: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """Smallest and largest height and width of the batches that a detector makes of images.

    Args:
        sizes: Width and height of the images.
        bounds: torchvision's min_size and max_size.
        multiple: Sides are enlarged to a multiple of this.
    """
    scaled = []
    for width, height in set(sizes):
        scale = min(bounds[0] / min(width, height), bounds[1] / max(width, height))
        scaled.append(tuple(math.ceil(int(side * scale) / multiple) * multiple for side in (height, width)))
    heights, widths = zip(*scaled, strict=True)
    return sorted({min(scaled, key=math.prod), (max(heights), max(widths))})


def find_levels(source: Source, kind: str, sizes: list[tuple[int, int]], bounds: tuple[int, int]) -> list[Level]:
    """Measure a model's levels, and check that it takes the images.

    Args:
        source: The model. The switch that it needs is noted in it.
        kind: 'fcos' or 'fasterrcnn'.
        sizes: Width and height of the images.
        bounds: torchvision's min_size and max_size.

    Raises:
        UsageError: if the model cannot be the backbone of a detector of these images.
    """
    def check(features: nn.Module) -> list[Level]:
        levels = measure_levels(features, source.input_size)
        backbone = PyramidBackbone(features, levels, 32, bounds[0], True, DETECTORS[kind])
        for shape in input_shapes(sizes, bounds, math.lcm(*backbone.strides)):
            check_size(features, levels, shape, source.input_size[0])
        return levels

    try:
        return source.settle(check)
    except UsageError as error:
        raise UsageError(f'{source.origin} cannot be the backbone of a detector. {error}') from error
