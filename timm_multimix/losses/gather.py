"""Collective operations that mix the joined batch of all processes.

The weights, the loss and the balanced gradient of one position do not depend on other positions. Every process
therefore computes the loss of all examples at its share of the positions. One all-to-all exchange distributes the
logits by position, and the backward pass returns the gradients to the processes of the examples. The ordinary logits
are a single position. One process computes their loss.
"""
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from .weights import is_eager_cpu


def num_processes() -> int:
    """Return the world size, or 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllToAll(torch.autograd.Function):
    """Differentiable all-to-all: send `send[i]` of the rows (r, ...) to process i and receive `receive[i]` from it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        ctx.sizes = send, receive
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send)
        return received

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        send, receive = ctx.sizes
        rows = grad.new_empty(sum(send), *grad.shape[1:])
        dist.all_to_all_single(rows, grad.contiguous(), send, receive)
        return rows, None, None


def gather_batch(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate tensors (b, ...) of all processes in the order of their ranks, without gradient."""
    if num_processes() == 1:
        return tensor
    gathered = tensor.new_empty(num_processes() * len(tensor), *tensor.shape[1:])
    all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor  # its name before PyTorch 2.14
    all_gather(gathered, tensor.contiguous())
    return gathered


def _position_shares(num_positions: int) -> list[int]:
    """Return the number of positions of each process. A single position belongs to the last process."""
    world_size = dist.get_world_size()
    ends = [num_positions * rank // world_size for rank in range(world_size + 1)]
    return [end - start for start, end in pairwise(ends)]


def share_positions(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Distribute tensors (b, r, ...) by position: return all examples at this process's share of the positions.

    The examples have the order of gather_batch. The share can be 0 if there are more processes than positions.
    """
    world_size = num_processes()
    if world_size == 1:
        return tensors
    shared = []
    for tensor in tensors:
        if tensor is not None:
            send = _position_shares(tensor.shape[1])
            share = send[dist.get_rank()]
            rows = _AllToAll.apply(tensor.transpose(0, 1), send, [share] * world_size)
            tensor = rows.unflatten(0, (world_size, share)).transpose(1, 2).flatten(0, 1)
        shared.append(tensor)
    return tuple(shared)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over processes. Its gradient is the gradient of the value of this process."""
    if num_processes() == 1:
        return values
    mean = values.detach().clone()
    dist.all_reduce(mean)
    # Every process has the gradient of its own value, since DDP averages the gradients.
    return values + (mean / num_processes() - values.detach())


def check_same_sizes(sizes: Sequence[int], device: torch.device) -> None:
    """Check that the batches of all processes have the same sizes (examples, positions, classes).

    On devices other than the CPU an asynchronous device assertion fails.
    """
    if num_processes() == 1:
        return
    own = torch.tensor(sizes, device=device)
    table = gather_batch(own).view(num_processes(), len(own))
    if not is_eager_cpu(device):
        torch._assert_async((table == own).all())
    elif not (table == own).all():
        shown = ', '.join(f'{tuple(row)} on rank {rank}' for rank, row in enumerate(table.tolist()))
        raise ValueError(
            'gather requires batches of the same size on all processes, got (examples, positions, classes) '
            f'{shown}. Use drop_last=True in the loader.')
