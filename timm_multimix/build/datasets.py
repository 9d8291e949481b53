"""Create the datasets of a run with timm."""
import argparse
import os
from typing import Any

from timm.data import MultiLabelTarget
from torch.utils.data import Dataset

from ..common.errors import UsageError, usage_errors
from ..data.demo import create_dataset, default_img_mode


def build_split(args: argparse.Namespace, in_chans: int, split: str, what: str, **own: Any) -> Dataset:
    """Create the dataset of one split. `what` is used in messages, `own` are further arguments of create_dataset.

    Raises:
        UsageError: if the dataset cannot be created or contains no images.
    """
    target_transform = None
    if args.task == 'multilabel':
        target_transform = MultiLabelTarget(args.num_classes, dense=args.target_format == 'multihot')
    # Only some readers accept target_format.
    target_options = {} if args.target_format == 'indices' else dict(target_format=args.target_format)
    options = dict(
        root=args.data_dir,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_img_mode=args.input_img_mode or default_img_mode(in_chans),
        input_key=args.input_key,
        target_key=args.target_key,
        target_transform=target_transform,
        trust_remote_code=args.dataset_trust_remote_code,
        **target_options,
    )
    if args.data_dir and not args.dataset and not os.path.exists(args.data_dir):
        raise UsageError(f'{what} data {args.data_dir}: there is no such folder in {os.getcwd()}.')
    with usage_errors(f'{what} data {args.data_dir or args.dataset}'):
        return create_dataset(args.dataset, split=split, **{'is_training': False, **options, **own})


def build_datasets(args: argparse.Namespace, in_chans: int) -> tuple[Dataset, Dataset | None]:
    """Create the training and validation datasets. The latter is None without a validation split."""
    train = build_split(
        args, in_chans, args.train_split, 'Training', is_training=True, seed=args.seed, repeats=args.epoch_repeats,
        num_samples=args.train_num_samples)
    if not args.val_split:
        return train, None
    return train, build_split(args, in_chans, args.val_split, 'Validation', num_samples=args.val_num_samples)
