"""Iteration over data loaders."""
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def batches_of(loader: Iterable) -> Iterator[Any]:
    """Iterate over a loader, with the CPU as default device while a batch is loaded.

    PyTorch's samplers draw with a CPU generator, which fails on another default device.
    """
    with torch.device('cpu'):
        batches = iter(loader)
    while True:
        with torch.device('cpu'):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
