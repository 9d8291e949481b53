"""Run a model on many images, with progress bars and batches that fit into memory."""
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from tqdm import tqdm

from ..common.errors import UsageError
from ..data.image_files import unreadable_images
from ..dense.heads import mean_of_heads
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


@torch.no_grad()
def embed(candidate: Candidate, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (b, c) and the embeddings (b, d) of images. An embedding is the input of the classifier."""
    features = candidate.model.forward_features(candidate.pixel_model.normalize(images))
    embeddings = candidate.model.forward_head(features, pre_logits=True)
    return mean_of_heads(candidate.model.forward_head(features)).float(), embeddings.flatten(1).float()


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
