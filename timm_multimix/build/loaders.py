"""Create the data loaders of a run with timm."""
import argparse
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.data import AugMixDataset, Mixup, NaFlexMixup, create_loader, create_naflex_loader
from torch.utils.data import DataLoader, Dataset

from ..common.errors import UsageError, usage_errors
from ..data.alternation import AlternatingCollateMixup, AlternatingMixup, BatchSchedule, alternate
from ..data.image_files import UnreadableImages, unreadable_images
from ..data.views import add_second_view
from .model import model_dtype
from .resumable import ResumableLoader
from .workers import ignore_signals

_logger = logging.getLogger(__name__)

TRAINING, VALIDATION = 'training', 'validation'
# Options with the name of an argument of create_loader.
_SAME_NAMES = (
    'batch_size', 'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob',
    'grayscale_prob', 'gaussian_blur_prob', 'worker_seeding')


@dataclass(frozen=True)
class Loaders:
    """Data loaders of a run."""
    train: Any
    evaluation: Any  # None without a validation split
    mixup_fn: Mixup | None  # mixup of batches on the device, None if the loader mixes images or mixup is disabled
    batch_size: float  # average size of a training batch per device
    schedule: BatchSchedule
    resumable: ResumableLoader | None = None  # the part of `train` that can resume within an epoch
    calibration: Any = None  # the same batches in every process
    unreadable: dict[str, UnreadableImages] = field(default_factory=dict)  # by TRAINING and VALIDATION

    def warn_of_unreadable(self, part: str, when: str = '') -> int:
        """Log the names of the unreadable images of this epoch in TRAINING or VALIDATION. Return their number.

        All processes must call it.
        """
        record = self.unreadable.get(part)
        if record is None:
            return 0
        if dist.is_available() and dist.is_initialized():
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, record.in_epoch())
            for indices in found:
                record.update(indices)
        images = record.in_epoch()
        if images:
            _logger.warning(
                f'{when}{len(images)} images could not be read in {part} and were replaced by the next images: '
                f'{record.names(images)}')
        return len(images)

    def report_unreadable(self) -> None:
        """Log the number of unreadable images of the whole run, if there are any."""
        totals = [f'{len(found)} of {len(record)} in {part} ({record.names(found)})'
                  for part, record in self.unreadable.items() if (found := record.in_run())]
        if totals:
            _logger.warning(f'Images that could not be read: {", ".join(totals)}.')


def mixup_active(args: argparse.Namespace) -> bool:
    """Return whether image mixup or CutMix is enabled."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


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


def _shared_options(args: argparse.Namespace, data_config: dict) -> dict[str, Any]:
    size = {} if args.naflex_loader else dict(input_size=data_config['input_size'])
    return dict(
        size,
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype(args) or torch.float32,
        device=torch.device(args.device),
        distributed=args.distributed,
        use_prefetcher=not args.no_prefetcher,
    )


def _train_options(args: argparse.Namespace, data_config: dict) -> dict[str, Any]:
    own = args.train_interpolation and not args.no_aug
    return dict(
        {name: getattr(args, name) for name in _SAME_NAMES},
        **_shared_options(args, data_config),
        is_training=True,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=args.train_interpolation if own else data_config['interpolation'],
        num_workers=args.workers,
    )


def _evaluation_options(args: argparse.Namespace, data_config: dict) -> dict[str, Any]:
    workers = args.workers
    if args.distributed and args.dataset.partition('/')[0].lower() in ('tfds', 'wds'):
        workers = min(2, workers)  # each worker of these readers pads its samples
    return dict(
        _shared_options(args, data_config),
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        num_workers=workers,
        crop_pct=data_config['crop_pct'],
    )


def _standard_train_loader(
        args: argparse.Namespace, dataset: Dataset, schedule: BatchSchedule, options: dict) -> tuple[Any, Mixup | None]:
    """Create the standard loader, with scheduled sizes, augmentation splits and image mixup."""
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
        **options,
    )
    if args.multimix != 'off' and args.multimix_views == 2:
        add_second_view(loader)
    if schedule.alternates and collate_fn is not None:
        hint = ' Add --no-prefetcher, which mixes images on the device.'
        with usage_errors(f'--multimix-prob {args.multimix_prob}', hint):
            alternate(loader, schedule)
    return loader, mixup_fn


def _naflex_train_loader(args: argparse.Namespace, dataset: Dataset, patch_size: Any, options: dict) -> Any:
    mixup_fn = None
    if mixup_active(args):
        mixing = _mixup_options(args)
        del mixing['mode'], mixing['cutmix_minmax']  # not supported by NaFlexMixup
        mixup_fn = NaFlexMixup(mixup_off_epoch=args.mixup_off_epoch, **mixing)
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
        **options,
    )


def _evaluation_loader(args: argparse.Namespace, dataset: Dataset, patch_size: Any, options: dict) -> Any:
    if not args.naflex_loader:
        return create_loader(dataset, **options)
    return create_naflex_loader(
        dataset=dataset,
        patch_size=patch_size,
        max_seq_len=args.naflex_max_seq_len,
        patchify_channels_last=not args.naflex_patchify_channels_first,
        **options,
    )


def _make_resumable(loader: Any, device: torch.device) -> tuple[Any, ResumableLoader | None]:
    """Wrap the DataLoader of a training loader in a ResumableLoader if possible."""
    inner = getattr(loader, 'loader', loader)  # the DataLoader inside timm's prefetcher
    if not ResumableLoader.can_wrap(inner):
        return loader, None
    resumable = ResumableLoader(inner, device)
    if inner is loader:
        return resumable, resumable
    loader.loader = resumable
    return loader, resumable


def build_calibration_loader(args: argparse.Namespace, dataset: Dataset, data_config: dict[str, Any]) -> Any:
    """Create a loader of the held-out images, with the transforms of validation. Every process loads all images."""
    with usage_errors('Loader options of calibration'):
        return create_loader(dataset, **{**_evaluation_options(args, data_config), 'distributed': False})


def build_loaders(
        args: argparse.Namespace,
        datasets: tuple[Dataset, Dataset | None],
        data_config: dict[str, Any],
        patch_size: tuple[int, int] | None,
        schedule: BatchSchedule,
) -> Loaders:
    """Create the data loaders of a run from its training and validation datasets.

    `patch_size` is that of the model, for NaFlex.

    Raises:
        UsageError: if timm rejects the options, or the training images do not fill one batch.
    """
    train, evaluation = datasets
    options = _train_options(args, data_config)
    patch_size = patch_size or (16, 16)
    mixup_fn, batch_size = None, float(args.batch_size)
    with usage_errors(f'Loader options{f" such as --aa {args.aa}" if args.aa else ""}'):
        if args.naflex_loader:
            loader = _naflex_train_loader(args, train, patch_size, options)
        else:
            loader, mixup_fn = _standard_train_loader(args, train, schedule, options)
    if args.train_img_sizes:
        batch_size = loader.batch_sampler.average_batch_size
    if len(loader) == 0:
        raise UsageError(
            f'{args.data_dir or args.dataset}: the {len(train)} training images do not fill one batch of '
            f'{args.batch_size}. Lower --batch-size.')
    loader_eval = None
    if evaluation is not None:
        with usage_errors('Loader options of validation'):
            loader_eval = _evaluation_loader(args, evaluation, patch_size, _evaluation_options(args, data_config))
    for outer in (loader, loader_eval):
        inner = getattr(outer, 'loader', outer)  # the DataLoader inside timm's prefetcher
        if isinstance(inner, DataLoader):
            inner.worker_init_fn = partial(ignore_signals, inner.worker_init_fn)
    loader, resumable = _make_resumable(loader, torch.device(args.device))
    records = {TRAINING: unreadable_images(train), VALIDATION: unreadable_images(evaluation)}
    unreadable = {part: record for part, record in records.items() if record is not None}
    return Loaders(loader, loader_eval, mixup_fn, batch_size, schedule, resumable, unreadable=unreadable)
