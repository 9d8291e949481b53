"""MultiMix over the joined batch of all processes, exactly, at the cost of their own batches.

Positions do not depend on each other: what a mix is made of, its loss and its balanced gradient are matters of one
position. So nobody needs the logits of all examples everywhere. Every process takes all examples at its share of the
positions, draws the weights there, and the backward pass returns the gradients to where the examples are: one exchange
of as many numbers as a process has logits, and the work of n mixes of a joined batch, shared out. The ordinary logits
are a single position, whose small loss one process forms for all.
"""
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist


def num_processes() -> int:
    """Processes that train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllToAll(torch.autograd.Function):
    """Rows (r, ...) go to the processes, `send[i]` of them to process i, `receive[i]` come from it; and back again."""

    @staticmethod
    def forward(ctx, rows, send, receive):
        ctx.sizes = send, receive
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send)
        return received

    @staticmethod
    def backward(ctx, grad):
        send, receive = ctx.sizes
        rows = grad.new_empty(sum(send), *grad.shape[1:])
        dist.all_to_all_single(rows, grad.contiguous(), send, receive)
        return rows, None, None


class _Mean(torch.autograd.Function):
    """Mean over processes of a value, whose gradient remains everybody's own."""

    @staticmethod
    def forward(ctx, values):
        values = values.clone()
        dist.all_reduce(values)
        return values / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad):
        return grad


def gather_batch(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Join the batches of all processes, in the order of their ranks.

    Gradients return to the process that the examples came from, summed over all that used them.

    Args:
        tensors: Tensors (b, ...) of the same shape on all processes; None stays None.

    Returns:
        Tensors (processes * b, ...); the arguments themselves if there is one process.
    """
    world_size = num_processes()
    if world_size == 1:
        return tensors
    each = [1] * world_size
    return tuple(
        tensor if tensor is None else
        _AllToAll.apply(tensor.expand(world_size, *tensor.shape), each, each).flatten(0, 1)
        for tensor in tensors)


def _position_shares(num_positions: int) -> list[int]:
    """How many positions each process takes; a single one is the last process's."""
    world_size = dist.get_world_size()
    ends = [num_positions * rank // world_size for rank in range(world_size + 1)]
    return [end - start for start, end in pairwise(ends)]


def share_positions(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Give every process all examples at its share of the positions.

    Args:
        tensors: Tensors (b, r, ...) of the same shape on all processes; None stays None.

    Returns:
        Tensors (processes * b, s, ...), examples in the order of gather_batch, s the share of this process: it is 0
        where there are more processes than positions. The arguments themselves if there is one process.
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
    """Mean over processes. Differentiated, it is the value of this process: their mean is taken with the gradients."""
    return values if num_processes() == 1 else _Mean.apply(values)


def check_same_sizes(sizes: Sequence[int], device: torch.device) -> None:
    """Refuse batches that differ in size between processes, and would not fit together.

    Args:
        sizes: What has to be the same everywhere, as many numbers on all processes.
        device: Where batches are.

    Raises:
        ValueError: on CPU, if they differ; elsewhere it is an assertion of the device, which nothing waits for.
    """
    if num_processes() == 1:
        return
    own = torch.tensor(sizes, device=device)
    table = own.new_empty(num_processes() * len(own))
    all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor  # its name before PyTorch 2.14
    all_gather(table, own)
    table = table.view(num_processes(), len(own))
    if device.type != 'cpu' or torch.compiler.is_compiling():
        torch._assert_async((table == own).all())
    elif not (table == own).all():
        shown = ', '.join(f'{tuple(row)} on rank {rank}' for rank, row in enumerate(table.tolist()))
        raise ValueError(
            'gather mixes the batches of all processes, which must have the same size: got (examples, positions, '
            f'classes) {shown}. Use drop_last=True in the loader.')
