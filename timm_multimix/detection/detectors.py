"""torchvision's detectors on a timm backbone."""
import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import create_model
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import MultiScaleRoIAlign, box_area

from ..common.errors import UsageError, usage_errors
from ..evaluation.models import RANDOM, Candidate
from .pyramid import PyramidBackbone, check_size, measure_levels

# Detectors, and the finest stride of their feature pyramid, as in their papers.
DETECTORS = dict(fcos=8, fasterrcnn=4)
_SCORE_THRESHOLD = 1e-3  # torchvision's defaults, 0.2 and 0.05, truncate the precision-recall curve
_ASPECT_RATIOS = (0.5, 1.0, 2.0)
_BOX_PER_STRIDE = 14  # FPN (Lin et al., 2017), equation 1: boxes of 224 pixels belong to stride 16
# Options of timm for models that accept images of one size only by default. Most models need none of them.
_SIZE_OPTIONS: tuple[dict[str, bool], ...] = ({}, dict(dynamic_img_size=True), dict(strict_img_size=False))


@dataclass
class Settings:
    """Options of the command that a result depends on.

    Attributes:
        frozen: Whether the backbone is not trained.
        batch_size: Batch size of each process.
        min_size: Shorter side of the images, in pixels.
        max_size: Maximum of their longer side.
    """
    detector: str = 'fcos'
    frozen: bool = True
    epochs: int = 10
    batch_size: int = 16
    lr: float = 2e-3
    opt: str = 'adamw'
    weight_decay: float = 0.05
    fpn_channels: int = 64
    head_convs: int = 1
    hflip: float = 0.0
    min_size: int = 96
    max_size: int = 160
    amp: bool = False


def _roi_align(strides: list[int]) -> MultiScaleRoIAlign:
    def map_levels(boxes: list[torch.Tensor]) -> torch.Tensor:
        """Assign each box to a level by its size, as in FPN, for levels of any stride."""
        sizes = torch.cat([box_area(one) for one in boxes]).sqrt()
        fits = sizes[:, None] >= _BOX_PER_STRIDE * torch.tensor(strides, device=sizes.device)
        return (fits.sum(dim=1) - 1).clamp(min=0)

    align = MultiScaleRoIAlign([str(index) for index in range(len(strides))], output_size=7, sampling_ratio=2)
    align.scales = [1 / stride for stride in strides]  # torchvision would round them to powers of 2
    align.map_levels = map_levels
    return align


def create_features(source: Candidate, **options: Any) -> nn.Module:
    """Create timm's feature extractor with the weights of a model, or new random weights if its weights are random.

    It returns a list of feature maps (b, c, h, w). `options` are further arguments of create_model.

    Raises:
        UsageError: if timm cannot extract feature maps.
    """
    with usage_errors(f'{source.origin}: timm cannot extract feature maps from this model'):
        # The getter returns (b, c, h, w) for every family; the default returns (b, h, w, c) for some.
        features = create_model(**source.options, **options, features_only=True, feature_cls='getter')
    if source.weights != RANDOM:
        state = source.model.state_dict()
        with usage_errors(f'{source.origin}, {source.weights}'):  # the extractor has no classifier
            features.model.load_state_dict({name: state[name] for name in features.model.state_dict() if name in state})
    return features


def _create_backbone(source: Candidate, settings: Settings) -> PyramidBackbone:
    """Create the backbone, and check that it accepts images of the shorter and longer side that the settings allow."""
    channels, *_ = source.data_config['input_size']
    errors = []
    for option in _SIZE_OPTIONS:
        try:
            features = create_features(source, **option)
            levels = measure_levels(features, source.data_config['input_size'])
            backbone = PyramidBackbone(
                features, levels, settings.fpn_channels, settings.min_size, settings.frozen,
                DETECTORS[settings.detector])
            multiple = math.lcm(*backbone.strides)
            height, width = (math.ceil(side / multiple) * multiple for side in (settings.min_size, settings.max_size))
            check_size(features, levels, (height, width), channels)
            return backbone
        except UsageError as error:
            errors.append(error)
    raise UsageError(f'{source.origin} cannot be the backbone of a detector. {errors[0]}') from errors[0]


def create_detector(source: Candidate, num_classes: int, settings: Settings) -> nn.Module:
    """Create a detector with a new feature pyramid and head, for a number of classes without the background.

    Like torchvision's detectors, it returns losses in training mode and predictions in evaluation mode.

    Raises:
        UsageError: if the model cannot be the backbone of a detector.
    """
    backbone = _create_backbone(source, settings)
    strides = backbone.strides
    options = dict(
        num_classes=num_classes + 1, min_size=settings.min_size, max_size=settings.max_size,
        image_mean=list(source.data_config['mean']), image_std=list(source.data_config['std']),
        size_divisible=math.lcm(*strides))
    if settings.detector == 'fcos':
        anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
        head = FCOSHead(backbone.out_channels, 1, num_classes + 1, settings.head_convs)
        # A ReLU follows. With torchvision's bias of 0 it can be 0 everywhere and have no gradient from the start.
        nn.init.ones_(head.regression_head.bbox_reg.bias)
        return FCOS(backbone, anchor_generator=anchors, head=head, score_thresh=_SCORE_THRESHOLD, **options)
    sizes = tuple((4 * stride, round(4 * math.sqrt(2) * stride)) for stride in strides)
    return FasterRCNN(
        backbone, rpn_anchor_generator=AnchorGenerator(sizes, (_ASPECT_RATIOS,) * len(sizes)),
        box_roi_pool=_roi_align(strides[:backbone.num_own_levels]), box_score_thresh=_SCORE_THRESHOLD, **options)
