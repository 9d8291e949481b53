"""Helpers for tests of the training script: image folders, runs of the script in this process, and faults in a run."""
import csv
import io
import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.optim import Lookahead
from timm.task import TrainingTask
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from timm_multimix.training import main

COLORS = dict(a=(200, 30, 30), b=(30, 30, 200), c=(30, 200, 30))


def make_images(root: Path, classes=('a', 'b', 'c'), count: int = 8, size: int = 32) -> Path:
    """Write noisy images, with one folder and one color for each class."""
    rng = np.random.default_rng(len(root.name))  # a different seed for each split
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            noise = rng.integers(-30, 30, (size, size, 3))
            pixels = (np.array(COLORS[name]) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f'{index}.png')
    return root


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    make_images(root / 'train', count=8)
    make_images(root / 'validation', count=4)
    return root


class LabelledImages:
    """Sixteen images with the interface of a dataset of the package `datasets`, as far as timm's reader uses it."""

    def __init__(self, split: str, labels: Callable[[int], Any]):
        self.split = split
        self.labels = labels
        self.info = SimpleNamespace(features=None, splits=None)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        file = io.BytesIO()
        Image.new('RGB', (32, 32), color=(index * 15, 100, 200 - index * 10)).save(file, 'png')
        return dict(image=dict(bytes=file.getvalue()), label=self.labels(index))

    def cast_column(self, *_) -> 'LabelledImages':
        return self

    def remove_columns(self, *_) -> Sequence[dict]:
        return [dict(label=self.labels(index)) for index in range(len(self))]


@pytest.fixture
def hub_images(monkeypatch):
    """Replace the package `datasets`. Call it with labels: all datasets hfds/... are then LabelledImages."""
    module, reader = ModuleType('datasets'), 'timm.data.readers.reader_hfds'
    module.__spec__ = ModuleSpec('datasets', None)
    module.Image = lambda decode: None
    monkeypatch.setitem(sys.modules, 'datasets', module)
    sys.modules.pop(reader, None)

    def use(labels: Callable[[int], Any]) -> None:
        module.load_dataset = lambda name, split, cache_dir=None: LabelledImages(split, labels)
    yield use
    sys.modules.pop(reader, None)


def same(a, b, path: str = '') -> None:
    """Assert that two checkpoints are bitwise equal, including NaN and signed zeros."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8)), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f'{path}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f'{path}/{index}')
    else:
        assert a == b or a != a, path


def on_batch(act: Callable[[int, Any, torch.Tensor], Any]) -> RemovableHandle:
    """Call `act(number, input, target)` before the forward pass of each training batch, counted from 1.

    A result that is not None replaces the input. The handle removes the hook, also as a context manager.
    """
    numbers = itertools.count(1)

    def hook(module, args):
        if isinstance(module, TrainingTask):
            changed = act(next(numbers), *args)
            return None if changed is None else (changed, *args[1:])
    return register_module_forward_pre_hook(hook)


def on_update(act: Callable[[int, Optimizer], Any]) -> RemovableHandle:
    """Call `act(number, optimizer)` after each optimizer step, counted from 1."""
    numbers = itertools.count(1)

    def hook(optimizer, args, kwargs):
        if not isinstance(optimizer, Lookahead):  # which steps another optimizer
            act(next(numbers), optimizer)
    return register_optimizer_step_post_hook(hook)


def on_validation_batch(act: Callable[[int], Any]) -> RemovableHandle:
    """Call `act(number)` before the forward pass of each validation batch, counted from 1."""
    numbers = itertools.count(1)

    def hook(module, args):
        if torch.is_inference_mode_enabled() and hasattr(module, 'forward_features'):
            act(next(numbers))
    return register_module_forward_pre_hook(hook)


@contextmanager
def stopping(updates: int | None = None, validated: int | None = None) -> Iterator[None]:
    """Send SIGTERM to a run in this process at an update or at a validation batch, counted from 1."""
    def stop(limit):
        return lambda number, *_: signal.raise_signal(signal.SIGTERM) if number == limit else None

    with on_update(stop(updates)), on_validation_batch(stop(validated)):
        yield


def spoiling(first: int, count: int = 1) -> RemovableHandle:
    """Replace `count` training batches by NaN, starting with batch `first`, counted from 1."""
    return on_batch(lambda number, input, target: input * torch.nan if first <= number < first + count else None)


class Script:
    """Run the script in this process, in a temporary folder.

    Attributes:
        folder: Working folder.
        status: Exit status of the last run.
        lines: Lines of the last run on stderr.
    """

    def __init__(self, folder: Path, capsys):
        self.folder = folder
        self.capsys = capsys
        self.status = None
        self.lines: list[str] = []

    def __call__(self, *argv) -> int:
        self.capsys.readouterr()
        self.status = main([str(argument) for argument in argv])
        self.lines = self.capsys.readouterr().err.splitlines()
        return self.status

    @property
    def text(self) -> str:
        return '\n'.join(self.lines)

    def train(self, data, *argv, **options) -> int:
        """Train a small model. `option=value` is passed as `--option value`."""
        defaults = dict(
            model='test_resnet', img_size=32, batch_size=8, epochs=1, warmup_epochs=0, lr=0.01, opt='sgd', workers=0,
            experiment='run', multimix_n=20)
        options = {**defaults, **options}
        given = [part for name, value in options.items() for part in (f'--{name.replace("_", "-")}', value)]
        return self('--data-dir', data, *given, *argv)

    def run_folder(self, name: str = 'run') -> Path:
        return self.folder / 'output' / 'train' / name

    def summary(self, name: str = 'run') -> list[dict]:
        with open(self.run_folder(name) / 'summary.csv', newline='') as file:
            return list(csv.DictReader(file))

    def checkpoint(self, file: str = 'last.pth.tar', name: str = 'run') -> dict:
        return torch.load(self.run_folder(name) / file, weights_only=True)

    def written(self) -> list[str]:
        """Paths of all files and folders in the working folder."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob('*'))


@pytest.fixture
def script(tmp_path, monkeypatch, capsys, restored_logging):
    folder = tmp_path / 'work'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Script(folder, capsys)
