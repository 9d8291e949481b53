"""Two augmented views of every image.

The views are stacked as channels (2c, h, w), and batches are (b, 2c, h, w). Batch transforms therefore apply to both
views: timm's mixup and CutMix use the same partners, mixing weights and boxes for both.
"""
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.data import AugMixDataset
from timm.data.loader import PrefetchLoader
from timm.data.scheduled_sampler import ScheduledTransformDataset


class TwoViews:
    """Apply a transform twice and stack the results as channels.

    Args:
        transform: Random transform of an image to an array or tensor (c, h, w).
    """

    def __init__(self, transform: Callable[[Any], np.ndarray | torch.Tensor]):
        self.transform = transform

    def __call__(self, image: Any) -> np.ndarray | torch.Tensor:
        views = [self.transform(image) for _ in range(2)]
        return np.concatenate(views) if isinstance(views[0], np.ndarray) else torch.cat(views)


class _EraseEach:
    """Apply random erasing to each view independently."""

    def __init__(self, erase: Callable[[torch.Tensor], torch.Tensor]):
        self.erase = erase

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        views = images.unflatten(1, (2, -1)).flatten(0, 1)
        return self.erase(views).view_as(images)


def add_second_view(loader: Any) -> Any:
    """Change a loader of timm's create_loader to return two views of every image.

    Call it before the first batch.

    Args:
        loader: Loader of images (c, h, w), with or without timm's prefetcher.

    Returns:
        The same loader. Its batches are (b, 2c, h, w); split_views splits them.

    Raises:
        TypeError: if the dataset has no transform that can be applied twice, as with augmentation splits.
    """
    dataset = loader.dataset
    if isinstance(dataset, ScheduledTransformDataset):
        dataset.transforms = tuple(TwoViews(transform) for transform in dataset.transforms)
    elif callable(getattr(dataset, 'transform', None)) and not isinstance(dataset, AugMixDataset):
        dataset.transform = TwoViews(dataset.transform)
    else:
        raise TypeError(f'{type(dataset).__name__} has no transform that can be applied twice.')
    if isinstance(loader, PrefetchLoader):
        loader.mean, loader.std = (pixels.repeat(1, 2, 1, 1) for pixels in (loader.mean, loader.std))
        if loader.random_erasing is not None:
            loader.random_erasing = _EraseEach(loader.random_erasing)
    return loader


def split_views(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a batch (b, 2c, h, w) into two views (b, c, h, w) with the memory format of the batch.

    Raises:
        ValueError: if the batch is not 4-dimensional or has an odd number of channels.
    """
    if images.ndim != 4 or images.shape[1] % 2:
        raise ValueError(f'Two views need a batch (b, 2c, h, w), got {tuple(images.shape)}. See add_second_view.')
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    first, second = images.chunk(2, dim=1)
    return first.contiguous(memory_format=layout), second.contiguous(memory_format=layout)
