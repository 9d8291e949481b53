"""Models from run folders, checkpoints, the Hub or timm, with the data configuration of their run."""
import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import create_model, is_model_pretrained, parse_model_name
from torch import nn
from torchvision.transforms.functional import normalize

from ..build.checkpoint import read_checkpoint
from ..build.model import check_model_name, create_run_model, model_options
from ..build.recorded import recorded_arguments
from ..build.saved_weights import RUN_CHECKPOINTS, plain_weights, weights_entry
from ..common.command_line import short_names
from ..common.errors import UsageError, usage_errors
from ..data.class_names import valid_classes
from ..data.demo import default_img_mode
from ..dense.positions import mean_of_heads
from ..options import build_training_parser

RANDOM = 'random'


@dataclass
class Candidate:
    """A model to evaluate or to transfer. It maps images in [0, 1] to logits (b, c).

    Attributes:
        name: Short and unique name for tables, without control characters.
        origin: Path of its checkpoint, or its name in timm or on the Hub.
        weights: Description of the weights.
        options: Arguments of timm's create_model, including the model's name, without the number of classes.
        model: The model, in evaluation mode.
        data_config: Input size, pixel statistics of each channel, crop and interpolation.
        img_mode: PIL mode of its images.
        args: Options of its run, None without a run.
        class_to_idx: Class names and their indices, None if they are not known.
    """
    name: str
    origin: str
    weights: str
    options: dict[str, Any]
    model: nn.Module
    data_config: dict[str, Any]
    img_mode: str = 'RGB'
    args: argparse.Namespace | None = None
    class_to_idx: dict[str, int] | None = None

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize images for the model."""
        return normalize(images, self.data_config['mean'], self.data_config['std'])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return mean_of_heads(self.model(self.normalize(images)))

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (b, c) and the embeddings (b, d) of images. An embedding is the input of the classifier."""
        features = self.model.forward_features(self.normalize(images))
        embeddings = self.model.forward_head(features, pre_logits=True)
        return mean_of_heads(self.model.forward_head(features)).float(), embeddings.flatten(1).float()


def _from_checkpoint(path: str) -> Candidate:
    checkpoint = read_checkpoint(path)
    args = recorded_arguments(checkpoint, path, build_training_parser())
    if args.task != 'classification':
        raise UsageError(f'{path} is of --task {args.task}: only models with one class for each image are evaluated.')
    key = weights_entry(checkpoint)
    with usage_errors(f'{path}, a checkpoint of {args.model}'):
        if args.num_classes is None:
            raise UsageError(f'{path} does not contain the number of classes.')
        options = model_options(args)
        model = create_run_model(args, options)
        model.load_state_dict(plain_weights(checkpoint[key]))
        config = resolve_data_config(vars(args), model=model)
    weights = f'{os.path.basename(path)}, {key}' if key != 'state_dict' else os.path.basename(path)
    options = {name: value for name, value in options.items() if name != 'num_classes'} | dict(bn_eps=args.bn_eps)
    classes = valid_classes(checkpoint.get('class_to_idx'))
    return Candidate(path, path, weights, options, model, config, args.input_img_mode, args, classes)


def _from_name(name: str, pretrained: bool) -> Candidate:
    """Create a model of timm or the Hub. Models of the Hub always have pretrained weights."""
    if ':' not in name and ('/' in name or os.sep in name):
        raise UsageError(f"{name}: no such folder or file. Names of models on the Hub start with 'hf-hub:'.")
    check_model_name(name, 'No such folder or file. Model')
    in_timm = parse_model_name(name)[0] is None
    if pretrained and in_timm and not is_model_pretrained(name):
        raise UsageError(f'{name}: timm has no pretrained weights of this model.')
    pretrained = pretrained or not in_timm
    with usage_errors(name):
        model = create_model(name, pretrained=pretrained)
    weights, config = 'pretrained' if pretrained else RANDOM, resolve_data_config(model=model)
    classes = valid_classes((getattr(model, 'pretrained_cfg', None) or {}).get('label_names'))
    return Candidate(name, name, weights, dict(model_name=name), model, config, None, None, classes)


def load_candidate(spec: str, pretrained: bool = True) -> Candidate:
    """Load a run folder, a checkpoint, a model of the Hub ('hf-hub:user/name') or a model of timm, on the CPU.

    `pretrained` is whether a model of timm has pretrained weights instead of random weights.

    Raises:
        UsageError: if there is no such model, or if the checkpoint is damaged or has no architecture.
    """
    path = spec
    if os.path.isdir(spec):
        path = next(filter(os.path.isfile, (os.path.join(spec, name) for name in RUN_CHECKPOINTS)), '')
        if not path:
            raise UsageError(
                f'{spec} is not a run folder with a finished epoch: it has none of {", ".join(RUN_CHECKPOINTS)}.')
    candidate = _from_checkpoint(path) if os.path.isfile(path) else _from_name(spec, pretrained)
    candidate.model.requires_grad_(False).eval()  # attacks only need gradients of the images
    config, channels = candidate.data_config, candidate.data_config['input_size'][0]
    config |= {name: adapt_to_chs(config[name], channels) for name in ('mean', 'std')}  # as in timm's loader
    candidate.img_mode = candidate.img_mode or default_img_mode(channels)
    return candidate


def load_candidates(specs: Sequence[str], pretrained: bool = True) -> list[Candidate]:
    """Load models and give them short, unique names.

    Raises:
        UsageError: as for load_candidate, or if a model is given twice.
    """
    names = short_names(specs)
    candidates = [load_candidate(spec, pretrained) for spec in specs]
    for candidate, name in zip(candidates, names, strict=True):
        candidate.name = name
    return candidates
