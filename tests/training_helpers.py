"""Helpers for tests of the training script: small image folders, and runs of the script in this process."""
import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multimix.training import main

COLOURS = dict(a=(200, 30, 30), b=(30, 30, 200), c=(30, 200, 30))


def make_images(root: Path, classes=('a', 'b', 'c'), count: int = 8, size: int = 32) -> Path:
    """Write noisy images, with one folder and one colour for each class."""
    rng = np.random.default_rng(len(root.name))  # a different seed for each split
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            noise = rng.integers(-30, 30, (size, size, 3))
            pixels = (np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f'{index}.png')
    return root


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    make_images(root / 'train', count=8)
    make_images(root / 'validation', count=4)
    return root


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
def script(tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'work'
    folder.mkdir()
    monkeypatch.chdir(folder)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield Script(folder, capsys)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
