"""The rendered letters and figures."""
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from timm_multimix.data.glyphs import FIGURES, FONTS, LETTERS, render_glyphs


def test_no_font_is_in_two_splits():
    fonts = [font for split in FONTS.values() for font in split]
    assert len(fonts) == len(set(fonts))


@pytest.mark.parametrize('style', ['painted', 'coarse', 'strokes'])
def test_same_seed_same_images(style):
    first, targets = render_glyphs('train', 40, style=style, seed=3)
    render_glyphs.cache_clear()
    again, _ = render_glyphs('train', 40, style=style, seed=3)
    assert (first == again).all() and targets.tolist() == [*range(36), 0, 1, 2, 3]
    other, _ = render_glyphs('train', 40, style=style, seed=4)
    assert (first != other).any(axis=(1, 2)).all()


def test_fewer_images_are_the_first_of_more():
    few, _ = render_glyphs('test', 510)
    many, targets = render_glyphs('test', 1100)
    assert (many[:510] == few).all() and (targets == np.arange(1100) % 36).all()


def test_all_images_are_different():
    images, _ = render_glyphs('train', 1010, characters='A')
    assert len(np.unique(images, axis=0)) == 1010


def test_images_use_the_range():
    images, _ = render_glyphs('train', 360)
    assert images.dtype == np.uint8 and images.shape == (360, 32, 32)
    assert images.min() == 0 and images.max() == 255 and 90 < images.mean() < 165
    corners = images[:, :4, :4].mean(axis=(1, 2))
    assert corners.std() > 40  # light on dark and dark on light


def test_coarse_images_are_light_on_black_and_fill_the_image():
    images, _ = render_glyphs('train', 260, characters=LETTERS, style='coarse')
    assert images.shape == (260, 8, 8) and set(np.unique(images)) == {round(255 * i / 16) for i in range(17)}
    assert (images[:, [0, 0, 7, 7], [0, 7, 0, 7]].mean() < 0.6 * images.mean())
    fills_height = (images[:, [0, 7]].max(axis=2) > 0).all(axis=1)
    fills_width = (images[:, :, [0, 7]].max(axis=1) > 0).all(axis=1)
    assert (fills_height | fills_width).mean() > 0.95


@pytest.mark.parametrize('characters', [FIGURES, LETTERS])
def test_characters_are_recognized_in_unseen_fonts(characters):
    train, train_targets = render_glyphs('train', 1000, characters=characters, style='coarse')
    test, test_targets = render_glyphs('test', 500, characters=characters, style='coarse')
    model = LogisticRegression(C=0.1, max_iter=200).fit(train.reshape(1000, -1) / 255, train_targets)
    assert model.score(test.reshape(500, -1) / 255, test_targets) > 0.5
