"""Datasets and loaders of a run, made by timm."""
import argparse
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import (
    AugMixDataset,
    Mixup,
    MultiLabelTarget,
    NaFlexMixup,
    create_loader,
    create_naflex_loader,
)
from torch.utils.data import DataLoader, Dataset

from ..common.errors import UsageError, usage_errors
from ..data.alternation import AlternatingCollateMixup, AlternatingMixup, BatchSchedule, alternate
from ..data.demo import create_dataset, default_img_mode
from ..data.image_files import UnreadableImages, unreadable_images
from ..data.views import add_second_view
from ..options import batch_schedule
from .checks import dataset_suggestion, mixup_active
from .interrupt import IgnoreSignals
from .resumable import ResumableLoader
from .unreadable import TRAINING, VALIDATION

_logger = logging.getLogger(__name__)

_DEFAULT_PATCH_SIZE = (16, 16)


@dataclass
class Loaders:
    """Where batches come from.

    Attributes:
        train: Training batches.
        evaluation: Validation batches, None without a validation split.
        mixup_fn: Mixes batches on the device; None where the loader does it, or where nothing is mixed.
        batch_size: Average size of a training batch on one device.
        schedule: Decides which batches are MultiMix batches.
        resumable: The part of train that knows its place in an epoch, None if there is none.
        validated: Whether a validation took place, in this process or before the run continued in it.
        calibration: Batches to fit a temperature on, all of them in every process; None without --calibrate.
        unreadable: The unreadable images of training and validation, where they are recorded.
    """
    train: Any
    evaluation: Any
    mixup_fn: Mixup | None
    batch_size: float
    schedule: BatchSchedule
    resumable: ResumableLoader | None = None
    validated: bool = False
    calibration: Any = None
    unreadable: dict[str, UnreadableImages] = field(default_factory=dict)

    def forget_validation_seed(self) -> None:
        """Let a continued run's validation draw no seed for its workers, since it drew one before."""
        self.validated = True
        loader = getattr(self.evaluation, 'loader', self.evaluation)
        if isinstance(loader, DataLoader) and loader.num_workers and loader.persistent_workers:
            loader.generator = torch.Generator()


def build_split(args: argparse.Namespace, in_chans: int, split: str, what: str, **own: Any) -> Dataset:
    """Make the dataset of one split.

    Args:
        args: Arguments of the run.
        in_chans: Channels of the images.
        split: Name of the split.
        what: What it is for, in an error.
        **own: More arguments of create_dataset.

    Raises:
        UsageError: if it cannot be made, or holds no images.
    """
    target_transform = None
    if args.task == 'multilabel':
        target_transform = MultiLabelTarget(args.num_classes, dense=args.target_format == 'multihot')
    # Not every reader knows of targets in other formats.
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
    with usage_errors(f'{what} data {args.data_dir or args.dataset}', dataset_suggestion(args.dataset)):
        return create_dataset(args.dataset, split=split, **{'is_training': False, **options, **own})


def build_datasets(args: argparse.Namespace, in_chans: int) -> tuple[Dataset, Dataset | None]:
    """Make the training and the validation dataset; the latter is None without a validation split.

    Raises:
        UsageError: if a dataset cannot be made, or holds no images.
    """
    train = build_split(
        args, in_chans, args.train_split, 'Training', is_training=True, seed=args.seed, repeats=args.epoch_repeats,
        num_samples=args.train_num_samples)
    if not args.val_split:
        return train, None
    return train, build_split(args, in_chans, args.val_split, 'Validation', num_samples=args.val_num_samples)


def _mixup_options(args: argparse.Namespace) -> dict[str, Any]:
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
        multi_label=args.task == 'multilabel',
    )


def _shared_options(args: argparse.Namespace, data_config: dict, device, dtype: torch.dtype | None) -> dict[str, Any]:
    return dict(
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=args.pin_mem,
        img_dtype=dtype or torch.float32,
        device=device,
        distributed=args.distributed,
        use_prefetcher=not args.no_prefetcher,
    )


def _train_options(args: argparse.Namespace, data_config: dict) -> dict[str, Any]:
    own = args.train_interpolation and not args.no_aug
    return dict(
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=args.train_interpolation if own else data_config['interpolation'],
        num_workers=args.workers,
        worker_seeding=args.worker_seeding,
    )


def _evaluation_options(args: argparse.Namespace, data_config: dict) -> dict[str, Any]:
    workers = args.workers
    if args.distributed and args.dataset.partition('/')[0].lower() in ('tfds', 'wds'):
        workers = min(2, workers)  # every worker of these readers pads its share
    return dict(
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        num_workers=workers,
        crop_pct=data_config['crop_pct'],
    )


def _standard_train_loader(args: argparse.Namespace, dataset: Dataset, input_size, shared: dict, own: dict):
    """The usual loader, also with scheduled sizes, augmentation splits, and mixup of images."""
    mixup_fn = collate_fn = None
    if mixup_active(args):
        if args.no_prefetcher:
            mixup_fn = AlternatingMixup(**_mixup_options(args))
        else:
            collate_fn = AlternatingCollateMixup(**_mixup_options(args))
    if args.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    progressive = args.train_size_schedule == 'progressive'
    loader = create_loader(
        dataset,
        input_size=input_size,
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs if progressive else None,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
        collate_fn=collate_fn,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        **shared,
        **own,
    )
    if args.multimix != 'off' and args.multimix_views == 2:
        add_second_view(loader)
    schedule = batch_schedule(args)
    if schedule.alternates and collate_fn is not None:
        try:
            alternate(loader, schedule)
        except TypeError as error:
            raise UsageError(
                f'--multimix-prob {args.multimix_prob}: {error} Add --no-prefetcher, which mixes images on the device.'
            ) from error
    return loader, mixup_fn


def _naflex_train_loader(args: argparse.Namespace, dataset: Dataset, patch_size, shared: dict, own: dict):
    mixup_fn = None
    if mixup_active(args):
        options = _mixup_options(args)
        del options['mode'], options['cutmix_minmax']  # it has neither
        mixup_fn = NaFlexMixup(mixup_off_epoch=args.mixup_off_epoch, **options)
    patches = dict(patch_size=patch_size)
    if args.naflex_patch_sizes:
        patches = dict(patch_size_choices=args.naflex_patch_sizes, patch_size_choice_probs=args.naflex_patch_size_probs)
    return create_naflex_loader(
        dataset=dataset,
        train_seq_lens=args.naflex_train_seq_lens,
        mixup_fn=mixup_fn,
        rank=args.rank,
        world_size=args.world_size,
        patchify_channels_last=not args.naflex_patchify_channels_first,
        **patches,
        **shared,
        **own,
    )


def _evaluation_loader(args: argparse.Namespace, dataset: Dataset, input_size, patch_size, shared: dict, own: dict):
    if not args.naflex_loader:
        return create_loader(dataset, input_size=input_size, **shared, **own)
    return create_naflex_loader(
        dataset=dataset,
        patch_size=patch_size,
        max_seq_len=args.naflex_max_seq_len,
        patchify_channels_last=not args.naflex_patchify_channels_first,
        **shared,
        **own,
    )


def _make_resumable(loader: Any, device: torch.device) -> tuple[Any, ResumableLoader | None]:
    """Wrap the DataLoader in a training loader, if its place can be known."""
    inner = getattr(loader, 'loader', loader)  # inside of timm's prefetcher
    if not ResumableLoader.can_wrap(inner):
        return loader, None
    resumable = ResumableLoader(inner, device)
    if inner is loader:
        return resumable, resumable
    loader.loader = resumable
    return loader, resumable


def build_calibration_loader(
        args: argparse.Namespace,
        dataset: Dataset,
        data_config: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype | None,
):
    """Make a loader of held-out images, as validation sees its own, that is not shared between processes."""
    shared = _shared_options(args, data_config, device, dtype)
    with usage_errors('Loader options of calibration'):
        return create_loader(
            dataset,
            input_size=data_config['input_size'],
            **{**shared, 'distributed': False},
            **_evaluation_options(args, data_config))


def build_loaders(
        args: argparse.Namespace,
        datasets: tuple[Dataset, Dataset | None],
        data_config: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype | None,
        patch_size: tuple[int, int] | None,
) -> Loaders:
    """Make the loaders of a run.

    Args:
        args: Arguments of the run.
        datasets: Training and validation dataset.
        data_config: Input size, pixel statistics and interpolation, from timm's resolve_data_config.
        device: Device of the batches.
        dtype: Dtype of the images, None for float32.
        patch_size: The model's patch size, for NaFlex.

    Raises:
        UsageError: if timm refuses the options, or the data do not fill one batch.
    """
    train, evaluation = datasets
    shared = _shared_options(args, data_config, device, dtype)
    own = _train_options(args, data_config)
    patch_size = patch_size or _DEFAULT_PATCH_SIZE
    mixup_fn, batch_size = None, float(args.batch_size)
    with usage_errors(f'Loader options{f" such as --aa {args.aa}" if args.aa else ""}'):
        if args.naflex_loader:
            loader = _naflex_train_loader(args, train, patch_size, shared, own)
        else:
            loader, mixup_fn = _standard_train_loader(args, train, data_config['input_size'], shared, own)
    if args.train_img_sizes:
        batch_size = loader.batch_sampler.average_batch_size
    if len(loader) == 0:
        raise UsageError(
            f'{args.data_dir or args.dataset}: the {len(train)} training images do not fill one batch of '
            f'{args.batch_size}. Lower --batch-size.')
    loader_eval = None
    if evaluation is not None:
        with usage_errors('Loader options of validation'):
            loader_eval = _evaluation_loader(
                args, evaluation, data_config['input_size'], patch_size, shared, _evaluation_options(args, data_config))
    for made in (loader, loader_eval):
        inner = getattr(made, 'loader', made)  # inside of timm's prefetcher
        if isinstance(inner, DataLoader):
            inner.worker_init_fn = IgnoreSignals(inner.worker_init_fn)
    loader, resumable = _make_resumable(loader, device)
    records = {TRAINING: unreadable_images(train), VALIDATION: unreadable_images(evaluation)}
    unreadable = {part: record for part, record in records.items() if record is not None}
    return Loaders(loader, loader_eval, mixup_fn, batch_size, batch_schedule(args), resumable, unreadable=unreadable)
