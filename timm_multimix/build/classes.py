"""Compare the class names of the datasets with the class names stored in a checkpoint."""
import argparse
import json
import logging
import os
from contextlib import suppress

from torch.utils.data import Dataset, IterableDataset

from ..common.errors import UsageError, usage_errors
from ..data.class_names import class_mapping, dataset_classes, map_targets, valid_classes
from ..data.dataset_types import TRAIN_SPLITS, VALIDATION_SPLITS
from ..data.image_files import image_root, listed
from .checkpoint import read_checkpoint
from .hub_files import CONFIG_NAME, HubError, download, is_hub_name
from .saved_weights import arguments_of

_logger = logging.getLogger(__name__)


def stored_classes(path: str) -> tuple[dict[str, int] | None, int | None]:
    """Read the class names and the number of classes of a model, None if unknown.

    They are in the checkpoint, or in the config.json on the Hub or next to safetensors.
    """
    with suppress(HubError, UsageError, OSError, ValueError, AttributeError):  # reported when the weights are loaded
        if is_hub_name(path) or path.endswith('.safetensors'):
            config = os.path.join(os.path.dirname(path), CONFIG_NAME)
            with open(download(path, CONFIG_NAME) if is_hub_name(path) else config, encoding='utf-8') as file:
                values = json.load(file)
            return valid_classes(values.get('label_names')), values.get('num_classes')
        checkpoint = read_checkpoint(path, verify=False)
        return valid_classes(checkpoint.get('class_to_idx')), arguments_of(checkpoint).get('num_classes')
    return None, None


def _known_classes(
        args: argparse.Namespace, own: dict[str, int] | None, path: str) -> tuple[dict[str, int] | None, str]:
    """Return the classes of the model, and the checkpoint that contains them or ''."""
    if not path or own is None:
        return own, ''
    names, num_classes = stored_classes(path)
    starts_new, count = not (args.validate or args.resume), max(own.values()) + 1
    if names is not None:
        is_new = set(own) - set(names) and len(own) != len(names)
        return (own, '') if starts_new and is_new else (names, path)  # timm reports other sizes of classifiers
    if num_classes in (None, count):
        _logger.warning(f'{path} contains no class names: only the number of classes is compared.')
    elif not starts_new:
        raise UsageError(f'{path} contains a model with {num_classes} classes, but the data have {count}.')
    return own, ''


def match_classes(args: argparse.Namespace, dataset: Dataset | None, split: str, known: dict, origin: str = '') -> None:
    """Map the targets of a dataset to the class indices of the model by class name, in place.

    `known` contains the class names of the model, from the checkpoint `origin` or, without it, from the training data.

    Raises:
        UsageError: if the dataset has a class that the model does not have.
    """
    own = dataset_classes(dataset)
    if own is None or own == known:
        return
    data = args.data_dir or args.dataset
    unknown = [name for name in own if name not in known]
    if unknown:
        owner = origin or f'split {args.train_split}'
        advice = '' if origin else ' Give a --class-map.'
        if origin and args.initial_checkpoint:
            advice = (' To train a new classifier from these weights, replace --initial-checkpoint by --pretrained '
                      f'--pretrained-path {args.initial_checkpoint}.')
        raise UsageError(
            f'{data}: split {split} has different classes, so labels would not match. It has {listed(unknown)}, and '
            f'the classes of {owner} are {listed(list(known))}.{advice}')
    with usage_errors(f'{data}, split {split}'):
        map_targets(dataset, class_mapping(own, known))
    _logger.info(f"{data}: split {split} has {len(own)} of the model's {len(known)} classes, mapped by name.")


def settle_classes(
        args: argparse.Namespace,
        train: Dataset,
        evaluation: Dataset | None,
        checkpoint: str,
) -> tuple[dict[str, int] | None, str]:
    """Compare the classes of the datasets with those of the initial checkpoint, if any, and set args.num_classes.

    Return the class names of the model and their indices, None if unknown, and the checkpoint that contains them or ''.

    Raises:
        UsageError: if there is only one class, --num-classes is wrong, or a dataset has a class that the model does
            not have.
    """
    _compare_splits(args, train, evaluation)
    own = dataset_classes(train)
    known, origin = _known_classes(args, own, checkpoint)
    if args.task == 'multilabel':
        if known and own and known != own:
            raise UsageError(f'{origin} was trained on different labels: {listed(list(known))}.')
        return known, origin
    if not known:
        return None, ''
    count, data = max(known.values()) + 1, args.data_dir or args.dataset
    if count < 2:
        raise UsageError(
            f'{data}: split {args.train_split} has a single class ({next(iter(known))}). Each class needs a folder '
            'with its images.')
    allowed = (None, count, max(own.values()) + 1 if own else None)  # the data may have fewer classes than the model
    if args.num_classes not in allowed:
        raise UsageError(
            f'--num-classes {args.num_classes}: {origin or data} has {count} classes. Leave the option out.')
    args.num_classes = count
    if not (args.validate and origin):
        match_classes(args, train, args.train_split, known, origin)
    match_classes(args, evaluation, args.val_split, known, origin)
    _check_teacher(args, known)
    return known, origin


def _check_teacher(args: argparse.Namespace, known: dict[str, int]) -> None:
    path = args.multimix_teacher_path
    names = stored_classes(path)[0] if path and args.multimix != 'off' else None
    if names and names != known:
        raise UsageError(
            f'--multimix-teacher-path {path}: the teacher has the classes {listed(list(names))}, and the student has '
            f'{listed(list(known))}. They must be the same, in the same order.')


def check_targets(args: argparse.Namespace, dataset: Dataset) -> None:
    """Raise UsageError if the task is multilabel and the first image has an invalid target, such as a class index."""
    if args.task == 'multilabel' and not isinstance(dataset, IterableDataset):
        with usage_errors(f'--task multilabel: the targets of {args.data_dir or args.dataset}'):
            dataset[0]


def _compare_splits(args: argparse.Namespace, train: Dataset, evaluation: Dataset | None) -> None:
    """Warn if validation uses the training images. Raise an error if training uses the validation images."""
    train_root, val_root = image_root(train), image_root(evaluation)
    if train_root is None or val_root is None:
        return
    whole, common = os.path.realpath(args.data_dir), os.path.commonpath([train_root, val_root])
    if common == val_root:
        reason = f'--val-split {args.val_split}:'
        if val_root == whole:
            reason = f'{args.data_dir} has no {args.val_split} split, so'
        _logger.warning(
            f'{reason} validation uses the training images. Name another split with --val-split, or give '
            "--val-split '' to train without validation.")
    elif common == train_root:
        synonyms = ' or '.join(TRAIN_SPLITS if train_root == whole else VALIDATION_SPLITS)
        raise UsageError(
            f'--train-split {args.train_split}: {args.data_dir} has no folder {synonyms}, and its images '
            f'include the validation images in {val_root}. Name the folder of the training images with --train-split.')
