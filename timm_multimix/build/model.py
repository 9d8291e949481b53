"""Create the model of a run with timm."""
import argparse
import logging
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import (
    create_model,
    is_model,
    list_models,
    parse_model_name,
    resolve_model_input_args,
    split_model_name_tag,
)
from torch import nn

from ..common.errors import UsageError, near_names, usage_errors
from ..dense.hook import outputs_in_evaluation
from .checkpoint import check_weights_file
from .hub_files import PICKLED_WEIGHTS_NAME, WEIGHTS_NAME, download, is_hub_name
from .option import option_name

_logger = logging.getLogger(__name__)


def check_model_name(model: str, option: str, others: tuple[str, ...] = ()) -> None:
    """Raise UsageError if timm does not have a model. `others` are further values of the option, for suggestions."""
    with usage_errors(option):
        source, name = parse_model_name(model)
    if source is None and not is_model(name):
        base = split_model_name_tag(name)[0]
        raise UsageError(f'{option} {model}: timm has no such model.{near_names(base, (*others, *list_models()))}')


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return arguments for timm's create_model, with the input size if the architecture depends on it."""
    overlay = dict(args.pretrained_cfg_overlay)
    if args.pretrained_path:
        # A file takes precedence over a URL. timm adapts the classifier if num_classes is -1.
        overlay = {'file': args.pretrained_path, 'num_classes': -1, **overlay}
    with usage_errors(f'--model {args.model}'):
        return resolve_model_input_args(
            args.model, vars(args), pretrained_cfg_overlay=overlay or None, **args.model_kwargs)


def input_channels(options: dict[str, Any]) -> int:
    """Return the number of input channels of a model that is created with these options."""
    return options.get('in_chans') or (options['pretrained_cfg'].get('input_size') or (3,))[0]


def create_run_model(args: argparse.Namespace, options: dict[str, Any]) -> nn.Module:
    """Create the model on the CPU, and set args.num_classes to its number of classes.

    Raises:
        UsageError: if timm cannot create the model, or the model has no classifier.
    """
    defaults = dict(
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
    )
    options = {**defaults, **options}  # --model-kwargs take precedence
    checkpoint_path = args.initial_checkpoint
    if is_hub_name(checkpoint_path):
        with usage_errors(f'--initial-checkpoint {checkpoint_path}'):
            checkpoint_path = download(checkpoint_path, WEIGHTS_NAME, PICKLED_WEIGHTS_NAME)
    files = ('initial_checkpoint', 'pretrained_path')
    started = ''.join(f', {option_name(name)} {path}' for name in files if (path := getattr(args, name)))
    with usage_errors(f'--model {args.model}{started}'):
        check_weights_file(checkpoint_path)
        model = create_model(
            pretrained=args.pretrained, scriptable=args.torchscript, checkpoint_path=checkpoint_path, **options)
    if not getattr(model, 'num_classes', 0):
        raise UsageError(f'--model {args.model}: the model has no classifier, or does not report num_classes.')
    args.num_classes = model.num_classes
    _initialize_head(args, model)
    if args.grad_checkpointing:
        with usage_errors('--grad-checkpointing'):
            model.set_grad_checkpointing(enable=True)
    parameters = sum(p.numel() for p in model.parameters())
    _logger.info(f'Model {args.model}: {parameters / 1e6:.1f} million parameters, {args.num_classes} classes.')
    return model


@torch.no_grad()
def _initialize_head(args: argparse.Namespace, model: nn.Module) -> None:
    classifier = model.get_classifier()
    with usage_errors('--head-init-scale, --head-init-bias'):
        if args.head_init_scale is not None:
            classifier.weight.mul_(args.head_init_scale)
            classifier.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            nn.init.constant_(classifier.bias, args.head_init_bias)


def resolve_data(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Return input size, pixel statistics, crop and interpolation from the options, or from the model by default.

    If the number of channels differs from that of the pretrained weights, the pixel statistics are averaged over
    channels, as in timm's loaders.
    """
    with usage_errors('--mean and --std take one value, or one for each channel'):
        config = resolve_data_config(vars(args), model=model)
    channels = config['input_size'][0]
    for name in ('mean', 'std'):
        if len(config[name]) != channels:  # timm's loaders do the same, with a warning each time
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    _logger.info(f'Input {" x ".join(map(str, config["input_size"]))}, crop {config["crop_pct"]}, '
                 f'{config["interpolation"]}, mean {config["mean"]}, std {config["std"]}.')
    return config


def blank_images(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Generate a black image (1, c, h, w) for each image size of a run, with the device and dtype of the model."""
    channels, *size = data_config['input_size']
    parameter = next(model.parameters())
    for height, width in sorted({tuple(size), *((side, side) for side in args.train_img_sizes or ())}):
        yield torch.zeros(1, channels, height, width, device=parameter.device, dtype=parameter.dtype)


@torch.no_grad()
def check_input_sizes(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any]) -> None:
    """Raise UsageError if the model does not accept an image size of the run."""
    model.eval()
    for images in blank_images(args, model, data_config):
        height, width = images.shape[2:]
        with usage_errors(f'{args.model} does not accept images of {height} x {width} pixels (see --img-size)'):
            model(images)
    model.train()


@torch.no_grad()
def report_positions(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any]) -> None:
    """Log the number of positions of an attached model at each image size, and warn if there is only one."""
    if args.multimix != 'dense' or args.naflex_loader:
        return
    model.eval()
    for images in blank_images(args, model, data_config):
        height, width = images.shape[2:]
        with outputs_in_evaluation(model):
            positions = model(images).dense_logits.shape[1]
        _logger.info(f'Number of positions of dense MultiMix at {height} x {width} pixels: {positions}.')
        if positions == 1:
            _logger.warning(
                f'--multimix dense: images of {height} x {width} pixels have a single position, so dense is the '
                'same as pooled. Raise --img-size, or choose a model with a smaller stride.')
    model.train()


def model_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Return the dtype of the model and the images, None for float32."""
    return getattr(torch, args.model_dtype) if args.model_dtype else None


def place_model(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """Convert BatchNorm layers, and move the model to its device, dtype and memory format."""
    device = torch.device(args.device)
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device, dtype=model_dtype(args))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        if device.type == 'cpu':
            raise UsageError('--sync-bn works on accelerators only.')
        args.dist_bn = ''  # statistics are already synchronized
        model = convert_sync_batchnorm(model)
        _logger.info('BatchNorm is synchronized. Zero-initialized BatchNorm scales, as in ResNets, may train worse.')
    if args.torchscript:
        with usage_errors('--torchscript'):
            model = torch.jit.script(model)
    return model
