import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, create_loader
from torch.utils.data import Dataset

from timm_multimix import TwoViews, add_second_view, split_views

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 0.75)


class Images(Dataset):
    """Random images that depend on the index. The attribute `loaded` lists the loaded indices."""

    def __init__(self, count=8):
        self.count = count
        self.transform = None
        self.loaded = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.loaded.append(index)
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        return (image if self.transform is None else self.transform(image)), index


def make_loader(dataset, **options):
    options = {
        'input_size': (3, 16, 16), 'batch_size': 4, 'is_training': True, 'mean': MEAN, 'std': STD, 'num_workers': 0,
        'device': torch.device('cpu'), 'color_jitter': 0.0, **options}
    return create_loader(dataset, **options)


@pytest.mark.parametrize('prefetcher', [True, False])
def test_each_image_is_loaded_once_and_augmented_twice(prefetcher):
    dataset = Images()
    loader = add_second_view(make_loader(dataset, use_prefetcher=prefetcher, scale=(0.3, 1.0)))
    batches = list(loader)
    assert sorted(dataset.loaded) == list(range(8))
    for images, target in batches:
        first, second = split_views(images)
        assert images.shape == (4, 6, 16, 16) and first.shape == second.shape == (4, 3, 16, 16) and len(target) == 4
        assert not torch.equal(first, second)


@pytest.mark.parametrize('prefetcher', [True, False])
def test_views_are_normalized_like_images(prefetcher):
    def batch(views):
        dataset = Images()
        loader = make_loader(dataset, use_prefetcher=prefetcher, no_aug=True)
        torch.manual_seed(0)
        return next(iter(add_second_view(loader) if views == 2 else loader))
    images, target = batch(1)
    views, same_target = batch(2)
    assert torch.equal(target, same_target)
    for view in split_views(views):
        torch.testing.assert_close(view, images)


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_views_are_mixed_with_the_same_partners_shares_and_boxes(mode, kind):
    alphas = dict(mixup_alpha=1.0, cutmix_alpha=0.0) if kind == 'mixup' else dict(mixup_alpha=0.0, cutmix_alpha=1.0)
    dataset = Images()
    loader = make_loader(dataset, no_aug=True, collate_fn=FastCollateMixup(mode=mode, num_classes=8, **alphas))
    np.random.seed(0)
    images, target = next(iter(add_second_view(loader)))
    first, second = split_views(images)
    assert torch.equal(first, second) and (target > 0.1).sum() > 4 + (target.max(1).values > 0.99).sum()
    plain = torch.stack([torch.from_numpy(np.random.default_rng(i).integers(0, 256, (16, 16, 3))) for i in range(8)])
    plain = (plain.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert all((plain - image).abs().amax((1, 2, 3)).min() > 0.05 for image in first[:2])


def test_random_erasing_of_each_view():
    loader = make_loader(Images(), no_aug=False, re_prob=1.0, re_mode='const', scale=(1, 1), ratio=(1, 1), hflip=0)
    random.seed(0)
    images, _ = next(iter(add_second_view(loader)))
    first, second = split_views(images)
    erased = [(view == 0).all(1) for view in (first, second)]
    assert all(each.any((1, 2)).all() for each in erased) and not torch.equal(*erased)


def test_scheduled_sizes():
    loader = add_second_view(make_loader(Images(12), input_size_choices=[16, 24], batch_size_choices=[4, 2]))
    shapes = {tuple(images.shape) for images, _ in loader}
    assert shapes <= {(4, 6, 16, 16), (2, 6, 24, 24)} and shapes
    for images, _ in loader:
        first, second = split_views(images)
        assert not torch.equal(first, second)


def test_works_in_workers():
    loader = add_second_view(make_loader(Images(), num_workers=1))
    assert [images.shape for images, _ in loader] == [(4, 6, 16, 16)] * 2


def test_transform_of_tensors():
    views = TwoViews(lambda image: image + torch.rand(1))(torch.zeros(3, 2, 2))
    assert views.shape == (6, 2, 2) and views[0, 0, 0] != views[3, 0, 0]
    assert 'TwoViews' in repr(TwoViews(str))


def test_augmentation_splits_are_refused():
    loader = make_loader(AugMixDataset(Images(), 2), num_aug_splits=2)
    with pytest.raises(TypeError, match='AugMixDataset has no transform that can be applied twice'):
        add_second_view(loader)


@pytest.mark.parametrize('shape', [(4, 3, 8, 8), (4, 6, 8)])
def test_batches_of_one_view_are_refused(shape):
    with pytest.raises(ValueError, match='See add_second_view'):
        split_views(torch.zeros(shape))
