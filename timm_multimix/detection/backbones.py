"""Backbones of detectors: feature extractors of timm from run folders, checkpoints, the Hub or timm."""
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import create_model
from torch import nn

from ..build.model import model_options
from ..common.command_line import short_names
from ..common.errors import usage_errors
from ..data.demo import default_img_mode
from ..evaluation.models import is_pretrained, load_candidate


@dataclass
class Source:
    """A model whose backbone is transferred.

    Attributes:
        name: Short and unique name for tables.
        origin: Path of its checkpoint, or its name in timm or on the Hub.
        weights: Description of the weights.
        options: Arguments of timm's create_model, including the model's name, without the number of classes.
        input_size: Channels, height and width of the images that the model was trained on.
        mean, std: Pixel statistics of each channel.
        img_mode: PIL mode of its images.
        state: Weights to load, None if create_model loads them or they are random.
    """
    name: str
    origin: str
    weights: str
    options: dict[str, Any]
    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    img_mode: str = 'RGB'
    state: dict[str, torch.Tensor] | None = None

    @property
    def digest(self) -> str | None:
        """Checksum of `state`, None without it."""
        if self.state is None:
            return None
        checksum = hashlib.sha256()
        for name, value in sorted(self.state.items()):
            checksum.update(name.encode())
            checksum.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return checksum.hexdigest()[:16]

    def features(self, **options: Any) -> nn.Module:
        """Return timm's feature extractor of the model, created with further options. Its maps are (b, c, h, w).

        Raises:
            UsageError: if timm cannot extract feature maps.
        """
        with usage_errors(f'{self.origin}: timm cannot extract feature maps from this model'):
            # The getter returns (b, c, h, w) for every family; the default returns (b, h, w, c) for some.
            features = create_model(**self.options, **options, features_only=True, feature_cls='getter')
        if self.state is not None:
            wanted = features.model.state_dict()  # without the classifier
            with usage_errors(f'{self.origin}, {self.weights}'):
                features.model.load_state_dict({name: self.state[name] for name in wanted if name in self.state})
        return features


def _load(spec: str, name: str, pretrained: bool) -> Source:
    if os.path.exists(spec):
        candidate = load_candidate(spec)
        options = {name: value for name, value in model_options(candidate.args).items() if name != 'num_classes'}
        source = Source(name, candidate.origin, candidate.weights, dict(options, bn_eps=candidate.args.bn_eps),
                        state=candidate.model.state_dict())
        config, img_mode = candidate.data_config, candidate.img_mode
    else:
        pretrained = is_pretrained(spec, pretrained)
        source = Source(name, spec, 'pretrained' if pretrained else 'random',
                        dict(model_name=spec, pretrained=pretrained))
        config, img_mode = resolve_data_config({}, model=source.features(), verbose=False), None
    source.input_size = tuple(config['input_size'])
    channels = source.input_size[0]
    source.mean, source.std = (adapt_to_chs(config[name], channels) for name in ('mean', 'std'))
    source.img_mode = img_mode or default_img_mode(channels)
    return source


def load_sources(specs: Sequence[str], pretrained: bool) -> list[Source]:
    """Load models and give them short, unique names. Names in timm get pretrained or random weights.

    Raises:
        UsageError: if a model does not exist, has no feature maps, or is given twice.
    """
    return [_load(spec, name, pretrained) for spec, name in zip(specs, short_names(specs), strict=True)]
