"""Helpers for tests with several processes. The processes use a file store, so no port is needed."""
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from timm_multimix.training import main

# The fork server imports these modules once.
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['torch', 'timm', 'timm_multimix', 'timm_multimix.training'])

PATIENCE = 240.0  # timeout in seconds, for slow machines


def _enter(function: Callable, rank: int, world_size: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder / "store"}', rank=rank, world_size=world_size,
        timeout=timedelta(seconds=PATIENCE))
    result = function(*arguments)
    with open(folder / f'result-{rank}', 'wb') as file:
        pickle.dump(result, file)
    dist.destroy_process_group()


def start(function: Callable, arguments: list[tuple]) -> list[multiprocessing.Process]:
    """Start a process for each tuple of arguments."""
    processes = [_context.Process(target=function, args=each) for each in arguments]
    for process in processes:
        process.start()
    return processes


def join(processes: list[multiprocessing.Process], patience: float = PATIENCE) -> list[int]:
    """Wait for processes and return their exit codes. Processes that exceed the timeout are killed."""
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()  # has no effect on a process that has ended
        process.join()
    return [process.exitcode for process in processes]


def on_ranks(folder: Path, world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """Run a function in the processes of a gloo process group and return the results by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = start(_enter, [(function, rank, world_size, folder, arguments) for rank in range(world_size)])
    assert join(processes) == [0] * world_size
    return [pickle.loads((folder / f'result-{rank}').read_bytes()) for rank in range(world_size)]


class Outcome(NamedTuple):
    """Result of the script in one process.

    Attributes:
        status: Exit status, or the negative number of the signal that killed the process.
        text: Output on stderr.
    """
    status: int
    text: str


def _run_script(folder: Path, rank: int, world_size: int, prepare: Callable | None, argv: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    with open(folder / f'stderr-{rank}', 'w') as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(folder.parent)
    if prepare is not None:
        prepare(rank)
    dist.rendezvous = lambda *_, **__: iter([(dist.FileStore(str(folder / 'store'), world_size), rank, world_size)])
    sys.exit(main(argv))


def run_script(
        folder: Path,
        world_size: int,
        *argv,
        prepare: Callable | None = None,
        wait_for: int | None = None,
) -> list[Outcome]:
    """Run train_timm.py in several processes, as torchrun does.

    Args:
        folder: Folder for the process group store and the output. The script runs in its parent.
        world_size: Number of processes.
        argv: Command-line arguments.
        prepare: Function that is called with the rank in each process before the script.
        wait_for: Rank of a process. When it has ended, the other processes are killed. None waits for all processes.

    Returns:
        The result of each process.
    """
    own = Path(tempfile.mkdtemp(dir=folder))
    argv = [str(argument) for argument in argv]
    processes = start(_run_script, [(own, rank, world_size, prepare, argv) for rank in range(world_size)])
    if wait_for is not None:
        processes[wait_for].join(PATIENCE)
    statuses = join(processes, PATIENCE if wait_for is None else 0)
    return [Outcome(status, (own / f'stderr-{rank}').read_text()) for rank, status in enumerate(statuses)]
