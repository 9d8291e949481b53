"""Data loading with the start method spawn: everything that a worker needs can be pickled."""
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from training_helpers import make_images

from timm_multimix import TwoViews
from timm_multimix.build.workers import ignore_signals
from timm_multimix.data.alternation import AlternatingCollateMixup, BatchSchedule
from timm_multimix.data.class_names import map_targets
from timm_multimix.data.demo import DEMOS, Part, create_dataset
from timm_multimix.data.image_files import unreadable_images
from timm_multimix.data.scenes import render_scenes
from timm_multimix.detection.splits import scenes


def _pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize('name', DEMOS)
def test_demo_datasets(name):
    dataset = Part(create_dataset(name, split='validation'), [3, 5])
    image, target = _pickled(dataset)[1]
    assert image.tobytes() == dataset[1][0].tobytes() and target == dataset[1][1]


def test_scenes():
    (image, target), (expected, expected_target) = _pickled(scenes('validation', 2))[1], scenes('validation', 2)[1]
    assert image.equal(expected) and target['boxes'].equal(expected_target['boxes'])
    scene, = render_scenes('validation', 1)
    assert np.array_equal(_pickled(scene).image, scene.image)


def test_image_files(tmp_path):
    """The record of unreadable images and mapped targets."""
    make_images(tmp_path, classes=('a', 'b'), count=2)
    (tmp_path / 'a' / '0.png').write_bytes(b'no image')
    dataset = create_dataset('', root=str(tmp_path), split='train')
    map_targets(dataset, {0: 1, 1: 0})
    worker = _pickled(dataset)
    assert worker[0][1] == worker[1][1] == 1 and worker[2][1] == 0
    assert unreadable_images(worker).in_epoch() == [0]
    assert unreadable_images(worker).names([0]).endswith('0.png')


def test_loader_functions():
    image = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    views = _pickled(TwoViews(create_transform(8, is_training=True, use_prefetcher=True)))(image)
    assert views.shape == (6, 8, 8)
    collate = _pickled(AlternatingCollateMixup(mixup_alpha=0.2, num_classes=2))
    assert collate([(np.zeros((3, 8, 8), dtype=np.uint8), 0)] * 2)[1].shape == (2, 2)
    assert _pickled(partial(ignore_signals, None)).func is ignore_signals
    assert _pickled(BatchSchedule(0.5)) == BatchSchedule(0.5)


SCRIPT = """
import multiprocessing
import sys
from functools import partial

from timm_multimix.training import main

if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    ['--multimix', 'dense', '--multimix-prob', '0.5', '--mixup', '0.2'],
    ['--multimix', 'dense', '--multimix-teacher', 'ema', '--multimix-views', '2'],
], ids=['alternating', 'views'])
def test_training(tmp_path, options):
    make_images(tmp_path / 'images' / 'train')
    make_images(tmp_path / 'images' / 'validation', count=4)
    (tmp_path / 'images' / 'train' / 'a' / '0.png').write_bytes(b'no image')
    (tmp_path / 'train.py').write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, 'train.py', '--data-dir', 'images', '--model', 'test_resnet', '--img-size', '32', '-b', '12',
         '--epochs', '1', '--workers', '2', '--device', 'cpu', *options],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '1 image' in done.stderr and 'could not be read' in done.stderr
