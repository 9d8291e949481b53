"""Test the readers of scenes, COCO files and Pascal VOC folders."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multimix.common.errors import UsageError
from timm_multimix.data.glyphs import FONTS
from timm_multimix.data.scenes import CLASSES, LETTERS, OBJECT_SIZES, SCENE_SIZE, digit_images, render_scenes
from timm_multimix.detection.splits import image_bounds, load_splits


def write_coco(root: Path, images: dict[str, tuple[int, int]], boxes: list[dict], /, **changes) -> str:
    """Write images of the given sizes and a COCO file. Return the value of --data."""
    (root / 'images').mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, (width, height) in images.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(root / 'images' / name)
    content = dict(
        images=[dict(id=10 * (index + 1), file_name=name, width=width, height=height)
                for index, (name, (width, height)) in enumerate(images.items())],
        categories=[dict(id=3, name='cat'), dict(id=90, name='dog')],
        annotations=[dict(id=index, **annotation) for index, annotation in enumerate(boxes)])
    (root / 'file.json').write_text(json.dumps({**content, **changes}))
    return f'coco:{root}/images:{root}/file.json'


IMAGES = {'a.png': (64, 48), 'b.png': (48, 64), 'c.png': (50, 40)}
ANNOTATIONS = [
    dict(image_id=10, category_id=3, bbox=[1, 2, 30, 20]),
    dict(image_id=10, category_id=90, bbox=[5, 5, 20, 20], area=123.0, iscrowd=1),
    dict(image_id=20, category_id=90, bbox=[0, 0, 48.4, 64], area=1000),
    dict(image_id=20, category_id=90, bbox=[3, 3, 0, 10]),
]


def write_voc(root: Path, year: str, splits: dict[str, list[str]], body: str = '') -> None:
    folder = root / 'VOCdevkit' / f'VOC{year}'
    for name in ('ImageSets/Main', 'JPEGImages', 'Annotations'):
        (folder / name).mkdir(parents=True)
    body = body or """
        <object><name>dog</name><difficult>0</difficult>
          <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>
          <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>
        <object><name>cat</name><difficult>1</difficult>
          <bndbox><xmin>11</xmin><ymin>6</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>"""
    for split, names in splits.items():
        (folder / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(names))
        for name in names:
            Image.new('RGB', (64, 48)).save(folder / 'JPEGImages' / f'{name}.jpg')
            (folder / 'Annotations' / f'{name}.xml').write_text(
                f'<annotation><size><width>64</width><height>48</height><depth>3</depth></size>{body}</annotation>')


def test_scenes_come_from_their_seed():
    scenes = render_scenes('train', 20, seed=3)
    for scene, again, other in zip(
            scenes, render_scenes('train', 25, seed=3), render_scenes('train', 20, seed=4), strict=False):
        assert np.array_equal(scene.image, again.image) and np.array_equal(scene.boxes, again.boxes)
        assert not np.array_equal(scene.image, other.image)
        assert scene.image.shape == (SCENE_SIZE, SCENE_SIZE) and scene.image.dtype == np.uint8
        assert len(scene.boxes) == len(scene.labels) > 0 and max(scene.labels) < len(CLASSES)
        longer = (scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1)
        assert OBJECT_SIZES[0] <= min(longer) and max(longer) <= OBJECT_SIZES[1]
        assert scene.boxes.min() >= 0 and scene.boxes.max() <= SCENE_SIZE


def test_splits_of_scenes_have_other_glyphs():
    images = {split: [scene.image.tobytes() for scene in render_scenes(split, 20)] for split in FONTS}
    assert len({image for split in images.values() for image in split}) == 60
    fonts = [font for split in FONTS.values() for font in split]
    assert len(set(fonts)) == len(fonts)
    digits = [{image.tobytes() for image in digit_images(split)[0]} for split in FONTS]
    assert not digits[0] & digits[1] and not (digits[0] | digits[1]) & digits[2]
    letters = ''.join(LETTERS[split] for split in FONTS)
    assert len(set(letters)) == len(letters) and not set('OI') & set(letters)
    for split in FONTS:
        labels = np.concatenate([scene.labels for scene in render_scenes(split, 100)])
        assert set(labels) == set(range(len(CLASSES)))
    with pytest.raises(ValueError, match='splits'):
        render_scenes('extra', 1)


def test_demo_data_has_the_size_of_its_scenes():
    train, test = load_splits('demo/scenes', None, 7, 5)
    assert (len(train), len(test)) == (7, 5) and train.classes == test.classes == CLASSES
    assert image_bounds(train)[0] == SCENE_SIZE  # scenes are not enlarged
    image, target = train.view('L', training=True)[0]
    assert image.shape == (1, SCENE_SIZE, SCENE_SIZE) and image.min() >= 0 and image.max() <= 1
    assert target['labels'].min() >= 1 and len(target['labels']) == len(target['boxes'])


def test_reads_coco_files(tmp_path):
    data = write_coco(tmp_path, IMAGES, ANNOTATIONS)
    train, test = load_splits(data, data)
    assert train.classes == ('cat', 'dog')  # ids 3 and 90
    assert train.sizes == [(64, 48), (48, 64), (50, 40)]
    target = test.view('RGB')[0][1]
    assert target['boxes'].tolist() == [[1, 2, 31, 22], [5, 5, 25, 25]] and target['labels'].tolist() == [1, 2]
    assert target['area'].tolist() == [600, 123] and target['iscrowd'].tolist() == [0, 1]
    assert train.view('RGB', training=True)[0][1]['boxes'].tolist() == [[1, 2, 31, 22]]  # without the crowd
    assert test.view('RGB')[1][1]['boxes'].tolist() == [[0, 0, 48, 64]]  # clipped; the empty box is dropped
    empty = train.view('RGB', training=True)[2][1]
    assert empty['boxes'].shape == (0, 4) and empty['labels'].dtype == torch.int64
    mirrored_image, mirrored = train.view('RGB', training=True, hflip=1.0)[0]
    assert mirrored['boxes'].tolist() == [[33, 2, 63, 22]]
    assert mirrored_image.flip(-1).equal(train.view('RGB', training=True)[0][0])
    assert train.view('RGB', training=True)[0][1]['boxes'].tolist() == [[1, 2, 31, 22]]  # unchanged by the flip


def test_classes_of_test_data_are_those_of_the_training_data(tmp_path):
    train = write_coco(tmp_path / 'train', IMAGES, ANNOTATIONS)
    test = write_coco(tmp_path / 'test', IMAGES, [dict(image_id=10, category_id=1, bbox=[0, 0, 9, 9])],
                      categories=[dict(id=1, name='dog')])
    assert load_splits(train, test)[1].view('RGB')[0][1]['labels'].tolist() == [2]
    other = write_coco(tmp_path / 'other', IMAGES, [dict(image_id=10, category_id=1, bbox=[0, 0, 9, 9])],
                       categories=[dict(id=1, name='bird')])
    with pytest.raises(UsageError, match='no class bird'):
        load_splits(train, other)


@pytest.mark.parametrize('changes, message', [
    (dict(annotations=[dict(image_id=11, category_id=3, bbox=[0, 0, 9, 9])]), 'the image is not in the file'),
    (dict(annotations=[dict(image_id=10, category_id=4, bbox=[0, 0, 9, 9])]), 'the category is not in the file'),
    (dict(annotations=[dict(image_id=10, category_id=3, bbox=[60, 0, 9, 9])]), r'\(69, 9\) is outside the image of 64'),
    (dict(annotations=[dict(image_id=10, category_id=3, bbox=[0, 0, -9, 9])]), 'is not a box'),
    (dict(annotations=[dict(image_id=10, category_id=3, bbox=[0, 0, float('nan'), 9])]), 'is not a box'),
    (dict(annotations=[dict(image_id=10, category_id=3, bbox=[0, 0, 9])]), 'not enough values'),
    (dict(annotations=[dict(image_id=[10], category_id=3, bbox=[0, 0, 9, 9])]), 'unhashable'),
    (dict(images=[dict(id=10, file_name='a.png', width=0, height=48)], annotations=[]), 'must be 1 or more'),
    (dict(annotations=[dict(image_id=10, category_id=3)]), r"annotations\[0\]: 'bbox'"),
    (dict(annotations=None), 'is not a COCO file'),
    (dict(annotations=[]), 'no boxes to train on'),
    (dict(annotations=[dict(image_id=10, category_id=3, bbox=[0, 0, 9, 9], iscrowd=1)]), 'no boxes to train on'),
    (dict(images=[dict(id=10, file_name='missing.png', width=9, height=9)], annotations=[]), 'missing.png'),
    (dict(categories=[dict(id=3, name='cat'), dict(id=4, name='cat')], annotations=[]), 'must be unique'),
    (dict(categories=[dict(id=3, name='cat'), dict(id=3, name='dog')], annotations=[]), 'must be unique'),
])
def test_refuses_wrong_coco_files(tmp_path, changes, message):
    data = write_coco(tmp_path, IMAGES, ANNOTATIONS, **changes)
    with pytest.raises(UsageError, match=message):
        load_splits(data, data)


def test_reads_voc_folders(tmp_path):
    write_voc(tmp_path, '2007', dict(trainval=['000001', '000002'], test=['000003']))
    write_voc(tmp_path, '2012', dict(trainval=['2008_1'], train=['2008_2'], val=['2008_3', '2008_4', '2008_5']))
    train, test = load_splits(f'voc:{tmp_path}:2007', None)
    assert (len(train), len(test)) == (2, 1) and train.classes == ('cat', 'dog')
    target = test.view('RGB')[0][1]  # pixels are counted from 1
    assert target['boxes'].tolist() == [[0, 0, 30, 20], [10, 5, 64, 48]] and target['labels'].tolist() == [2, 1]
    assert target['difficult'].tolist() == [False, True]
    assert train.view('RGB', training=True)[0][1]['labels'].tolist() == [2]
    assert [len(part) for part in load_splits(f'voc:{tmp_path}', None)] == [2, 1]
    assert [len(part) for part in load_splits(f'voc:{tmp_path}:2012', None)] == [1, 3]
    assert [len(part) for part in load_splits(f'voc:{tmp_path}:2007+2012', None)] == [3, 1]


@pytest.mark.parametrize('year, body, message', [
    ('2010', '', 'does not contain VOCdevkit/VOC2010'),
    ('1999', '', 'does not contain VOCdevkit/VOC1999'),
    ('2007', '<object><name>dog</name></object>', 'bndbox'),
    ('2007', '<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>99</xmax><ymax>9</ymax></bndbox>'
             '</object>', 'outside the image'),
    ('2007', '<object>', 'is not XML'),
])
def test_refuses_wrong_voc_folders(tmp_path, year, body, message):
    write_voc(tmp_path, '2007', dict(trainval=['1'], test=['2']), body)
    with pytest.raises(UsageError, match=message):
        load_splits(f'voc:{tmp_path}:{year}', None)
