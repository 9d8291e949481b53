"""Backbones for a detector: the timm models of runs, checkpoints and names, as extractors of feature maps."""
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import (
    create_model,
    is_model,
    is_model_pretrained,
    list_models,
    parse_model_name,
    split_model_name_tag,
)
from torch import nn

from ..build.model import model_options
from ..common.command_line import short_names
from ..common.errors import UsageError, near_names, usage_errors
from ..data.demo import default_img_mode
from ..evaluation.models import load_candidate

# timm's switches for models that otherwise take images of one size only. None of them is needed by most models.
_SIZE_SWITCHES = ({}, dict(dynamic_img_size=True), dict(strict_img_size=False))


@dataclass
class Source:
    """A model whose backbone is transferred.

    Attributes:
        name: Short and unique name for tables.
        origin: Path of its checkpoint, or its name in timm or on the Hub.
        weights: Description of the weights.
        options: Arguments of timm's create_model, with the model's name and without the number of classes.
        input_size: Channels, height and width of the images that it was made for.
        mean: Pixel mean of each channel.
        std: Pixel standard deviation of each channel.
        img_mode: PIL mode of its images.
        state: Weights to load, None if create_model loads them or they are random.
        switch: The one of timm's switches with which the model takes the images, None before it is known.
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
    switch: dict[str, bool] | None = field(default=None, repr=False)

    @property
    def digest(self) -> str | None:
        """Checksum of the weights to load, None for those that a name stands for."""
        if self.state is None:
            return None
        checksum = hashlib.sha256()
        for name, value in sorted(self.state.items()):
            checksum.update(name.encode())
            checksum.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return checksum.hexdigest()[:16]

    def features(self, switch: dict[str, bool] | None = None) -> nn.Module:
        """The model as timm's extractor of feature maps, all of them (b, c, h, w).

        Raises:
            UsageError: if timm cannot extract feature maps from it.
        """
        switch = self.switch or {} if switch is None else switch
        with usage_errors(f'{self.origin}: timm cannot extract feature maps from this model'):
            # The getter returns (b, c, h, w) for every family; the default returns (b, h, w, c) for some.
            features = create_model(**self.options, **switch, features_only=True, feature_cls='getter')
        if self.state is not None:
            wanted = features.model.state_dict()  # without the classifier, which a detector does not need
            kept = {name: value for name, value in self.state.items() if name in wanted}
            with usage_errors(f'{self.origin}, {self.weights}'):
                features.model.load_state_dict(kept)
        return features

    def settle(self, check: Callable[[nn.Module], Any]) -> Any:
        """Find the switch with which the model passes a check of the images that it takes.

        Args:
            check: Called with the feature extractor. It raises UsageError if the model does not fit.

        Returns:
            The result of the check.

        Raises:
            UsageError: the first one raised by the check, if the model passes with no switch.
        """
        first = None
        for switch in _SIZE_SWITCHES:
            try:
                result = check(self.features(switch))
            except UsageError as error:
                first = first or error
            else:
                self.switch = switch
                return result
        raise first


def _source(origin: str, weights: str, options: dict[str, Any], config: dict[str, Any], img_mode: str | None) -> Source:
    channels = config['input_size'][0]
    mean, std = (adapt_to_chs(config[name], channels) for name in ('mean', 'std'))
    return Source(origin, origin, weights, options, tuple(config['input_size']), mean, std,
                  img_mode or default_img_mode(channels))


def _from_run(path: str) -> Source:
    candidate = load_candidate(path)
    options = {name: value for name, value in model_options(candidate.args).items() if name != 'num_classes'}
    options['bn_eps'] = candidate.args.bn_eps
    source = _source(candidate.origin, candidate.weights, options, candidate.data_config, candidate.img_mode)
    source.state = candidate.model.state_dict()
    return source


def _from_name(name: str, pretrained: bool) -> Source:
    if ':' not in name and ('/' in name or os.sep in name):
        raise UsageError(f"{name}: no such folder or file. Models of the Hub start with 'hf-hub:'.")
    with usage_errors(name):
        source, base = parse_model_name(name)
    if source is None and not is_model(base):
        hint = near_names(split_model_name_tag(base)[0], list_models())
        raise UsageError(f"{name}: no such folder or file, nor a model of timm.{hint} "
                         "Models of the Hub start with 'hf-hub:'.")
    if source is None and pretrained and not is_model_pretrained(base):
        raise UsageError(f'{name}: timm has no pretrained weights of this model. Omit --pretrained.')
    pretrained = pretrained or source is not None
    weights, options = 'pretrained' if pretrained else 'random', dict(model_name=name, pretrained=pretrained)
    config = resolve_data_config({}, model=Source(name, name, weights, options).features(), verbose=False)
    return _source(name, weights, options, config, None)


def load_sources(specs: Sequence[str], pretrained: bool) -> list[Source]:
    """Load models for their backbones, and give them short, unique names.

    Args:
        specs: Run folders, checkpoints, names on the Hub ('hf-hub:user/name') or names in timm.
        pretrained: Whether names in timm get pretrained weights. Otherwise they get random ones.

    Raises:
        UsageError: if there is no such model, it has no feature maps, or it is given twice.
    """
    names = short_names(specs)
    sources = [_from_run(spec) if os.path.exists(spec) else _from_name(spec, pretrained) for spec in specs]
    for source, name in zip(sources, names, strict=True):
        source.name = name
    return sources
