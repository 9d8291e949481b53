"""Run a model on many images, with progress bars and batches that fit into memory."""
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..calibration.temperature import last_layers
from ..common.errors import UsageError
from ..data.image_files import unreadable_images
from .models import Candidate

_logger = logging.getLogger(__name__)


def progress(batches: Iterable, description: str) -> Iterator:
    """Iterate over batches, with a progress bar on a terminal."""
    return tqdm(batches, desc=description, leave=False, disable=None, dynamic_ncols=True)


class InParts:
    """Call functions on batches. If memory does not suffice, halve the batch, and also later batches.

    Attributes:
        limit: Maximum number of images per call, None if no batch was too large.
    """

    def __init__(self) -> None:
        self.limit: int | None = None

    def __call__(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """Return function(*tensors). The results of several calls are concatenated along the first axis."""
        while True:
            size = self.limit or len(tensors[0])
            try:
                parts = [function(*part) for part in zip(*(t.split(size) for t in tensors), strict=True)]
                return torch.cat(parts)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and 'allocate memory' not in str(error):
                    raise
                if size == 1:
                    raise UsageError(f'There is not enough memory for one image: {error}') from error
            # Outside the handler, because the exception keeps the tensors of the failed call alive.
            self.limit = max(size // 2, 1)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class Embedder:
    """Compute logits and embeddings. An embedding is the input of the last affine layers, averaged over positions.

    Args:
        candidate: The model.
        images: A few images in [0, 1], used to find the layers.

    Raises:
        UsageError: if no layer is found.
    """

    def __init__(self, candidate: Candidate, images: torch.Tensor):
        self.candidate = candidate
        names = last_layers(candidate.model, candidate.pixel_model.normalize(images))
        self.layers = [candidate.model.get_submodule(name) for name in names]
        if not self.layers:
            raise UsageError(f'{candidate.name}: found no affine layer that computes the logits.')

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits and embeddings, concatenated along the last axis: (b, c + d)."""
        inputs: dict[nn.Module, list[torch.Tensor]] = {}

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            # a layer may be applied several times
            inputs.setdefault(module, []).append(_average(module, args[0]))

        handles = [layer.register_forward_pre_hook(record) for layer in self.layers]
        try:
            logits = self.candidate.pixel_model(images)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([logits, *(features for layer in self.layers for features in inputs[layer])], dim=1).float()

    def split(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (..., c) and embeddings (..., d)."""
        num_classes = self.candidate.num_classes
        return joined[..., :num_classes], joined[..., num_classes:]


def _average(module: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Return the mean (b, d) of features over their positions."""
    if isinstance(module, nn.modules.conv._ConvNd):
        features = features.movedim(1, -1)
    return features.flatten(1, -2).mean(1) if features.ndim > 2 else features


@torch.no_grad()
def predict(candidate: Candidate, batches: Iterable, in_parts: InParts, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (n, c) and targets (n,) of batches of images, on the CPU. Log unreadable images.

    Raises:
        UsageError: if there are no images, or if logits are not finite.
    """
    device = candidate.pixel_model.mean.device
    name = f'{candidate.name}: {what}'
    outputs, targets = [], []
    for images, target in progress(batches, name):
        outputs.append(in_parts(candidate.pixel_model, images.to(device)).float().cpu())
        targets.append(target)
    if not outputs:
        raise UsageError(f'{name}: there are no images.')
    record = unreadable_images(getattr(batches, 'dataset', None))
    if record is not None and (indices := record.in_run()):
        _logger.warning(
            f'{name}: {len(indices)} images could not be read and were replaced by the next images: '
            f'{record.names(indices)}')
    logits = torch.cat(outputs)
    if bad := int((~logits.isfinite().all(1)).sum()):
        raise UsageError(
            f'{name}: the outputs for {bad} of {len(logits)} images are not finite. The model diverged, or its weights '
            'are damaged.')
    return logits, torch.cat(targets)
