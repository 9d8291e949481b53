"""Models to evaluate, from run folders, checkpoints, the Hub or timm, with the data configuration of their run."""
import argparse
import os
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import create_model, is_model_pretrained, parse_model_name
from torch import nn

from ..build.checkpoint import read_checkpoint
from ..build.model import check_model_name, create_run_model, model_options
from ..build.recorded import recorded_arguments
from ..build.saved_weights import RUN_CHECKPOINTS, plain_weights, weights_entry
from ..common.command_line import short_names
from ..common.errors import UsageError, usage_errors
from ..data.class_names import valid_classes
from ..data.demo import default_img_mode
from ..dense.heads import mean_of_heads
from ..options import build_training_parser


class PixelModel(nn.Module):
    """Classifier of images in [0, 1], which it normalizes with the model's mean and std. Returns logits (b, c)."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.register_buffer('mean', torch.tensor(mean, device=device).view(-1, 1, 1))
        self.register_buffer('std', torch.tensor(std, device=device).view(-1, 1, 1))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize images for the model."""
        return (images - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return mean_of_heads(self.model(self.normalize(images)))


@dataclass
class Candidate:
    """A model to evaluate.

    Attributes:
        name: Short and unique name for tables, without control characters.
        origin: Path of its checkpoint, or its name in timm or on the Hub.
        weights: Description of the weights.
        pixel_model: The model, in evaluation mode.
        data_config: Input size, pixel statistics, crop and interpolation.
        num_classes: Number of classes.
        img_mode: PIL mode of its images.
        args: Options of its run, None without a run.
        class_to_idx: Class names and their indices, None if they are not known.
    """
    name: str
    origin: str
    weights: str
    pixel_model: PixelModel
    data_config: dict[str, Any]
    num_classes: int
    img_mode: str
    args: argparse.Namespace | None = None
    class_to_idx: dict[str, int] | None = None

    @property
    def model(self) -> nn.Module:
        """The timm model."""
        return self.pixel_model.model


def _from_checkpoint(path: str) -> Candidate:
    checkpoint = read_checkpoint(path)
    args = recorded_arguments(checkpoint, path, build_training_parser())
    if args.task != 'classification':
        raise UsageError(f'{path} is of --task {args.task}: only models with one class for each image are evaluated.')
    key = weights_entry(checkpoint)
    with usage_errors(f'{path}, a checkpoint of {args.model}'):
        if args.num_classes is None:
            raise UsageError(f'{path} does not contain the number of classes.')
        model = create_run_model(args, model_options(args))
        model.load_state_dict(plain_weights(checkpoint[key]))
        config = resolve_data_config(vars(args), model=model, verbose=False)
    weights = f'{os.path.basename(path)}, {key}' if key != 'state_dict' else os.path.basename(path)
    return _candidate(path, weights, model, config, valid_classes(checkpoint.get('class_to_idx')), args)


def is_pretrained(name: str, wanted: bool) -> bool:
    """Return whether a model of timm or the Hub has pretrained weights to load.

    `wanted` applies to models of timm. Models of the Hub always have pretrained weights.

    Raises:
        UsageError: if there is no such model, or if timm has no pretrained weights for it.
    """
    if ':' not in name and ('/' in name or os.sep in name):
        raise UsageError(f"{name}: no such folder or file. Names of models on the Hub start with 'hf-hub:'.")
    check_model_name(name, 'Model')
    if parse_model_name(name)[0] is not None:
        return True
    if wanted and not is_model_pretrained(name):
        raise UsageError(f'{name}: timm has no pretrained weights of this model.')
    return wanted


def _from_name(name: str) -> Candidate:
    with usage_errors(name):
        model = create_model(name, pretrained=is_pretrained(name, True))
        config = resolve_data_config({}, model=model, verbose=False)
    classes = valid_classes((getattr(model, 'pretrained_cfg', None) or {}).get('label_names'))
    return _candidate(name, 'pretrained', model, config, classes)


def _candidate(
        origin: str, weights: str, model: nn.Module, config: dict[str, Any], classes: dict[str, int] | None,
        args: argparse.Namespace | None = None,
) -> Candidate:
    num_classes = getattr(model, 'num_classes', 0)
    if num_classes < 2:
        raise UsageError(f'{origin}: the model has {num_classes} classes, but evaluation needs two or more.')
    model.requires_grad_(False)  # attacks only need gradients of the images
    in_chans = config['input_size'][0]
    mean, std = (adapt_to_chs(config[name], in_chans) for name in ('mean', 'std'))  # as in timm's loader
    img_mode = getattr(args, 'input_img_mode', None) or default_img_mode(in_chans)
    return Candidate(
        origin, origin, weights, PixelModel(model, mean, std).eval(), config, num_classes, img_mode, args, classes)


def load_candidate(spec: str) -> Candidate:
    """Load a run folder, a checkpoint, a model of the Hub ('hf-hub:user/name') or a model of timm, on the CPU.

    Raises:
        UsageError: if there is no such model, or if the checkpoint is damaged or has no architecture.
    """
    if os.path.isdir(spec):
        paths = [os.path.join(spec, name) for name in RUN_CHECKPOINTS]
        path = next(filter(os.path.isfile, paths), None)
        if path is None:
            raise UsageError(f'{spec} is not a run folder: it has none of {", ".join(RUN_CHECKPOINTS)}.')
        return _from_checkpoint(path)
    return _from_checkpoint(spec) if os.path.isfile(spec) else _from_name(spec)


def load_candidates(specs: list[str]) -> list[Candidate]:
    """Load models and give them short, unique names.

    Raises:
        UsageError: as for load_candidate, or if a model is given twice.
    """
    names = short_names(specs)
    candidates = [load_candidate(spec) for spec in specs]
    for candidate, name in zip(candidates, names, strict=True):
        candidate.name = name
    return candidates
