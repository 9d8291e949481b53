"""Temperature scaling with --calibrate: held-out images and the calibrated checkpoint."""
import argparse
import copy
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from timm.models import clean_state_dict
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ..build.checkpoint import read_checkpoint
from ..build.datasets import build_split
from ..build.saved_weights import (
    CALIBRATED,
    arguments_of,
    described,
    eval_weights_of,
    metrics_of,
    split_metric,
    weights_entry,
)
from ..common.errors import RunError, UsageError, raise_if_interrupted, usage_errors
from ..common.files import replacing
from ..data.dataset_types import code_danger
from ..data.demo import Part
from ..data.image_files import image_root
from ..data.loading import batches_of
from .temperature import calibrate, scalable_classifier

_logger = logging.getLogger(__name__)

_FEW_IMAGES = 100


def calibration_share(text: str) -> float | None:
    """Parse the value of --calibrate as a share of the training images. Return None for the name of a split."""
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise UsageError(f'--calibrate {text}: a share of the training images must be between 0 and 1, such as 0.1.')
    return share


def share_split(first: str, second: str) -> bool:
    """Return whether two split names are known to overlap, such as train and train[90%:].

    Different slices of a split are not compared.
    """
    (name, _, part), (other_name, _, other_part) = first.partition('['), second.partition('[')
    return name == other_name and (part == other_part or not (part and other_part))


def check_trusted(run: argparse.Namespace, splits: Sequence[str]) -> None:
    """Raise UsageError if splits of the data that a checkpoint names can run code."""
    if danger := code_danger(run.dataset or '', run.data_dir, splits):
        raise UsageError(
            f'{run.dataset} in {run.data_dir}, the data of the run, can run code ({danger}) and is not opened because '
            'a checkpoint names it. If you trust it, give --dataset and --data-dir.')


def share_images(first: Dataset, second: Dataset) -> bool:
    """Return whether two datasets are known to share images: one folder contains the other, or the arrays are equal."""
    roots = [image_root(first), image_root(second)]
    if all(roots):
        return os.path.commonpath(roots) in roots
    images = [getattr(dataset, 'images', None) for dataset in (first, second)]
    return all(isinstance(array, np.ndarray) for array in images) and np.array_equal(*images)


def hold_out(
        args: argparse.Namespace, train: Dataset, evaluation: Dataset | None, in_chans: int,
) -> tuple[Dataset, Dataset | None]:
    """Return the images to train on, and the images to calibrate on or None without --calibrate.

    A share is selected with --seed, so that a continued run holds out the same images.

    Raises:
        UsageError: if images cannot be held out, or the split is also used for training or validation.
    """
    if args.calibrate is None:
        return train, None
    share = calibration_share(args.calibrate)
    if share is None:
        held_out = build_split(args, in_chans, args.calibrate, 'Calibration')
        for other, split in ((train, args.train_split), (evaluation, args.val_split)):
            if other is not None and (share_split(split, args.calibrate) or share_images(held_out, other)):
                raise UsageError(
                    f'--calibrate {args.calibrate}: these are the images of --{"train" if other is train else "val"}-'
                    f'split {split}. Name another split, or train with --calibrate 0.1, which keeps a share of the '
                    'training images out of training.')
        return train, held_out
    if isinstance(train, IterableDataset):
        raise UsageError(
            f'--calibrate {args.calibrate}: a share of a streamed dataset cannot be held out. Name a split instead, '
            'such as train[90%:] with --train-split train[:90%] if the dataset supports slices.')
    generator = torch.Generator('cpu').manual_seed(args.seed)
    order = torch.randperm(len(train), generator=generator, device='cpu').tolist()
    count = round(share * len(train))
    if not 2 <= count < len(train):
        few = 'small' if count < 2 else 'large'
        raise UsageError(f'--calibrate {args.calibrate}: that share of {len(train)} training images is too {few}.')
    _logger.info(f'{count} of {len(train)} training images are held out to fit a temperature on (--calibrate).')
    return Part(train, sorted(order[count:])), Part(train, sorted(order[:count]))


def check_continues(args: argparse.Namespace, path: str) -> None:
    """Raise UsageError if the weights in a checkpoint may have been trained on the images that this run holds out."""
    if args.calibrate is None or calibration_share(args.calibrate) is None:
        return
    before = arguments_of(read_checkpoint(path, verify=False))
    if any(before.get(name) != getattr(args, name) for name in ('calibrate', 'seed')):
        raise UsageError(
            f'--calibrate {args.calibrate}: {path} was trained with --calibrate {before.get("calibrate")} --seed '
            f'{before.get("seed")}, so it may have seen the images that would be held out now. Give the same options, '
            'or a separate split.')


def check_classifier(args: argparse.Namespace, model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Raise UsageError if --calibrate is given and no temperature can be folded into the classifier of the model."""
    if args.calibrate is None:
        return
    images = torch.rand(2, *input_size, generator=torch.Generator('cpu').manual_seed(0), device='cpu')
    parameter = next(model.parameters())
    with usage_errors(f'--calibrate {args.calibrate}'):
        scalable_classifier(model, images.to(parameter))


def write_calibrated(folder: str, model: nn.Module, loader: Any, autocast: Callable[[], Any]) -> str | None:
    """Calibrate the best checkpoint of a run and write model_calibrated.pth.tar.

    It contains a single state_dict that timm can load. 'eval_weights' is the weight set that was calibrated. 'metrics'
    contains its metrics except the loss, which calibration changes. The model is not changed: the weights are loaded
    into a copy. `loader` contains the held-out images, and `autocast` returns the context of a forward pass.

    Return the path of the calibrated checkpoint, or None with a warning if no temperature can be fitted.
    """
    best = read_checkpoint(os.path.join(folder, 'model_best.pth.tar'))
    model = copy.deepcopy(model)
    entry = weights_entry(best)
    model.load_state_dict(clean_state_dict(best[entry]))
    dtype = next(model.parameters()).dtype
    try:
        with autocast():
            temperature = calibrate(model, ((images.to(dtype=dtype), target) for images, target in batches_of(loader)))
    except ValueError as error:
        _logger.warning(f'Not calibrated: {error}')
        return None
    names = ['epoch', 'arch', 'args', 'version', 'class_to_idx']
    if split_metric(arguments_of(best).get('eval_metric', ''))[1] != 'loss':
        names.append('metric')
    checkpoint = dict(
        {name: best[name] for name in names if name in best},
        state_dict=model.state_dict(), eval_weights=eval_weights_of(best), temperature=temperature)
    if 'metrics' in best:
        checkpoint['metrics'] = {
            'state_dict': {name: value for name, value in metrics_of(best, entry).items() if name != 'loss'}}
    path = os.path.join(folder, CALIBRATED)
    try:
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
    except (OSError, RuntimeError) as error:
        raise_if_interrupted(error)
        raise RunError(f'{path} could not be written: {error}') from error
    if not isinstance(loader.dataset, IterableDataset) and len(loader.dataset) < _FEW_IMAGES:
        _logger.warning(
            f'The temperature was fitted on {len(loader.dataset)} images. With fewer than {_FEW_IMAGES} it can make '
            'the probabilities worse.')
    _logger.info(
        f'Calibrated {described(best, entry)}: temperature {temperature:.4g}, folded into the classifier, {path}')
    return path


def forget_calibrated(folder: str) -> None:
    """Remove the calibrated checkpoint of a run that continues, because its best weights may change."""
    with suppress(FileNotFoundError):
        os.remove(os.path.join(folder, CALIBRATED))
