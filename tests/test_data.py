"""Embedded datasets and their interface for timm."""
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from timm.data import create_loader

from timm_multimix.data.demo import DEMOS, DigitsDataset, GlyphsDataset, LettersDataset, create_dataset
from timm_multimix.options import build_training_parser


@pytest.fixture(scope='module')
def splits():
    return DigitsDataset('train'), DigitsDataset('validation')


def test_split_is_fixed_and_complete(splits):
    train, validation = splits
    assert (len(train), len(validation)) == (1442, 355)
    expected = (load_digits().images * 255 / 16).round().astype(np.uint8)
    assert sorted(map(bytes, [*train.images, *validation.images])) == sorted(map(bytes, expected))
    held_out = [33, 36, 37, 40, 44]
    assert (validation.images[:5] == expected[held_out]).all()
    assert validation.targets[:5] == load_digits().target[held_out].tolist()
    image, target = validation[0]
    assert target == validation.targets[0] and image.mode == 'RGB' and image.size == (32, 32)
    small = np.asarray(image.convert('L').resize((8, 8)))
    assert np.corrcoef(small.ravel(), expected[33].ravel())[0, 1] > 0.95


def test_split_is_stratified(splits):
    for dataset in splits:
        counts = Counter(dataset.targets)
        assert set(counts) == set(range(10)) and max(counts.values()) - min(counts.values()) <= 8


@pytest.mark.parametrize('is_training', [True, False])
@pytest.mark.parametrize('name', DEMOS)
def test_works_with_timms_loader(name, is_training):
    dataset = create_dataset(name, split='train' if is_training else 'val', input_img_mode='L')
    loader = create_loader(
        dataset, (1, 48, 48), 16, is_training=is_training, mean=(0.5,), std=(0.5,), num_workers=0,
        device=torch.device('cpu'))
    images, target = next(iter(loader))
    assert images.shape == (16, 1, 48, 48) and images.dtype == torch.float32 and target.dtype == torch.int64


def test_glyphs_follow_the_characters():
    train, test = GlyphsDataset('train', num_samples=72), GlyphsDataset('test')
    assert (len(GlyphsDataset()), len(GlyphsDataset('val')), len(train), len(test)) == (2000, 1000, 72, 3000)
    assert train.classes[10] == 'A' and len(train.classes) == 36
    assert train.targets == [*range(36)] * 2
    assert train[10][0].size == (32, 32) and train[10][1] == 10
    assert (train.images[:36] != test.images[:36]).any(axis=(1, 2)).all()


def test_letters_have_the_style_of_the_digits():
    letters, digits = LettersDataset('test'), DigitsDataset('validation')
    assert letters.classes[0] == 'A' and len(letters.classes) == 26
    assert letters.images.shape[1:] == digits.images.shape[1:] == (8, 8)
    assert set(np.unique(letters.images)) == set(np.unique(digits.images))
    assert abs(letters.images.mean() - digits.images.mean()) < 25


def test_number_of_images():
    assert len(create_dataset('demo/glyphs', split='train', num_samples=700)) == 700
    with pytest.raises(ValueError, match='at least 1, got 0'):
        create_dataset('demo/glyphs', split='train', num_samples=0)


def test_target_transform():
    dataset = create_dataset('demo/digits', split='train', target_transform=lambda target: target + 100)
    assert dataset[0][1] >= 100


def test_unknown_names_and_splits():
    with pytest.raises(ValueError, match='demo/digits'):
        create_dataset('demo/numbers')
    with pytest.raises(ValueError, match='validation'):
        create_dataset('demo/digits', split='third')


def test_other_datasets_are_created_by_timm(tmp_path):
    with pytest.raises(RuntimeError, match='0 images'):
        create_dataset('', root=str(tmp_path))


def test_demo_defaults_are_options():
    names = build_training_parser().options.keys()
    for demo in DEMOS.values():
        assert set(demo.defaults()) <= names
