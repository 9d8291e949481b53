"""Running a model over many images: progress bars, and batches that fit into memory."""
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..calibration.temperature import last_layers
from ..common.errors import UsageError
from .models import Candidate


def progress(batches: Iterable, description: str) -> Iterator:
    """Iterate over batches, with a progress bar on a terminal."""
    return tqdm(batches, desc=description, leave=False, disable=None, dynamic_ncols=True)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or 'allocate memory' in str(error)


class InParts:
    """Calls functions on batches. If memory does not suffice, halves the batch, and later batches too.

    Attributes:
        limit: Maximum number of images per call, None if no batch was too large.
    """

    def __init__(self) -> None:
        self.limit: int | None = None

    def __call__(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """Return function(*tensors), joined along the first axis if it took several calls."""
        while True:
            size = self.limit or len(tensors[0])
            try:
                parts = [function(*part) for part in zip(*(t.split(size) for t in tensors), strict=True)]
                return torch.cat(parts)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if size == 1:
                    raise UsageError(f'There is not enough memory for one image: {error}') from error
            # outside the handler: the exception keeps the tensors of the failed call alive
            self.limit = max(size // 2, 1)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class Embedder:
    """Computes logits and embeddings. An embedding is the input of the last affine layers, averaged over positions.

    A few images in [0, 1] are used to find the layers.

    Raises:
        UsageError: if no layer is found.
    """

    def __init__(self, candidate: Candidate, images: torch.Tensor):
        self.candidate = candidate
        self.layers = [
            candidate.model.get_submodule(name)
            for name in last_layers(candidate.model, candidate.pixel_model.normalise(images))]
        if not self.layers:
            raise UsageError(f'{candidate.name}: no affine layer found that its logits come from.')

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits and embeddings, joined along the last axis: (b, c + d)."""
        inputs: dict[nn.Module, list[torch.Tensor]] = {}

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            # a layer may be applied several times
            inputs.setdefault(module, []).append(_vectors(module, args[0]))

        handles = [layer.register_forward_pre_hook(keep) for layer in self.layers]
        try:
            logits = self.candidate.pixel_model(images)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([logits, *(vectors for layer in self.layers for vectors in inputs[layer])], dim=1).float()

    def split(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (..., c) and embeddings (..., d)."""
        num_classes = self.candidate.num_classes
        return joined[..., :num_classes], joined[..., num_classes:]


def _vectors(module: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Features (b, d), averaged over positions."""
    if isinstance(module, nn.modules.conv._ConvNd):
        features = features.movedim(1, -1)
    return features.flatten(1, -2).mean(1) if features.ndim > 2 else features


@torch.no_grad()
def predict(candidate: Candidate, batches: Iterable, in_parts: InParts, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, c) and targets (n,) of batches of images, on the CPU. A UsageError if logits are not finite."""
    device = candidate.pixel_model.mean.device
    name = f'{candidate.name}: {what}'
    outputs, targets = [], []
    for images, target in progress(batches, name):
        outputs.append(in_parts(candidate.pixel_model, images.to(device)).float().cpu())
        targets.append(target)
    if not outputs:
        raise UsageError(f'{name}: there are no images.')
    logits = torch.cat(outputs)
    if bad := int((~logits.isfinite().all(1)).sum()):
        raise UsageError(
            f'{name}: the outputs for {bad} of {len(logits)} images are not finite. The model diverged, or its weights '
            'are damaged.')
    return logits, torch.cat(targets)
