"""Training and test images by name: the embedded scenes, COCO files and Pascal VOC folders."""
import json
import os
import statistics
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection
from torchvision.datasets.voc import DATASET_YEAR_DICT

from ..common.errors import UsageError, usage_errors
from ..data.demo import DEMO_PREFIX
from ..data.scenes import CLASSES, SCENE_SIZE, render_scenes
from .datasets import DetectionDataset, Object, Size

SCENES = f'{DEMO_PREFIX}scenes'
_NUM_SCENES = dict(train=800, validation=300, test=300)


def scenes(split: str, count: int | None = None, seed: int = 0) -> DetectionDataset:
    """Return the embedded scenes of a split."""
    images = []
    for scene in render_scenes(split, count or _NUM_SCENES[split], seed):
        objects = [Object(box, CLASSES[label]) for box, label in zip(scene.boxes, scene.labels, strict=True)]
        images.append((scene.image, (SCENE_SIZE, SCENE_SIZE), objects))
    return DetectionDataset(f'{SCENES} ({split})', images, CLASSES)


def image_bounds(dataset: DetectionDataset, min_size: int | None = None) -> tuple[int, int]:
    """Return torchvision's min_size and max_size for images. By default min_size is their median shorter side."""
    shorter = min_size or statistics.median_low([min(size) for size in dataset.sizes])
    return shorter, round(shorter * 1333 / 800)


def _read_coco(where: str, spec: str) -> DetectionDataset:
    """Read 'IMAGES:ANNOTATIONS.json', a folder of images and a COCO file. Classes are sorted by id."""
    folder, _, path = spec.rpartition(':')
    if not os.path.isdir(folder):
        raise UsageError(f'{where}: {folder or spec} is not a folder. The format is coco:IMAGES:ANNOTATIONS.json.')
    images: dict[Any, tuple[str, Size, list[Object]]] = {}
    with usage_errors(where), open(path, encoding='utf-8') as file:
        content = json.load(file)
    with usage_errors(f'{where} is not a COCO file'):
        names = {entry['id']: str(entry['name']) for entry in sorted(content['categories'], key=lambda one: one['id'])}
        for entry in content['images']:
            size = int(entry['width']), int(entry['height'])
            images[entry['id']] = os.path.join(folder, entry['file_name']), size, []
        if len(images) < len(content['images']) or len(set(names.values())) < len(content['categories']):
            raise ValueError('the ids of images, and the ids and names of categories, must be unique.')
        annotations = list(content['annotations'])
    for index, annotation in enumerate(annotations):
        with usage_errors(f'{where}: annotations[{index}]'):
            for kind, entries in (('image', images), ('category', names)):
                if annotation[f'{kind}_id'] not in entries:
                    raise ValueError(f'the {kind} is not in the file.')
            x, y, width, height = map(float, annotation['bbox'])
            images[annotation['image_id']][2].append(Object(
                (x, y, x + width, y + height), names[annotation['category_id']], float(annotation.get('area') or 0),
                bool(annotation.get('iscrowd', 0))))
    return DetectionDataset(where, images.values(), list(names.values()))


def _voc_parts(where: str, spec: str, is_training: bool) -> tuple[str, list[tuple[str, str]]]:
    """Parse 'ROOT[:YEAR[+YEAR]]'. Return the root, and the years and image sets of a split.

    They are trainval and test of 2007 with its test split, otherwise train and val. With several years, the training
    split is trainval of all if 2007 is one of them, as usual. Without a year, it is 2007 if it is there, else 2012.
    """
    root, _, given = spec.rpartition(':')
    if not root or not given[:4].isdigit():
        root, given = spec, ''
    folders = {year: os.path.join(root, entry['base_dir']) for year, entry in DATASET_YEAR_DICT.items()}
    years = given.split('+') if given else ['2007' if os.path.isdir(folders['2007']) else '2012']
    for year in years:
        if not os.path.isdir(folders.get(year, '')):
            raise UsageError(f'{where}: {root} does not contain VOCdevkit/VOC{year}.')
    if '2007' in years and os.path.isfile(os.path.join(folders['2007'], 'ImageSets', 'Main', 'test.txt')):
        return root, [(year, 'trainval') for year in years] if is_training else [('2007', 'test')]
    return root, [(year, 'train' if is_training else 'val') for year in years]


def _read_voc_annotation(path: str) -> tuple[Size, list[Object]]:
    """Read the size and the objects of an image. VOC counts pixels from 1, both ends included."""
    objects = []
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise UsageError(f'{path} is not XML: {error}.') from error
    with usage_errors(f'{path} is not an annotation of Pascal VOC'):
        annotation = VOCDetection.parse_voc_xml(root)['annotation']
        size = int(annotation['size']['width']), int(annotation['size']['height'])
        for one in annotation.get('object', []):
            x1, y1, x2, y2 = (float(one['bndbox'][side]) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
            is_difficult = str(one.get('difficult', '0')).strip() == '1'
            objects.append(Object((x1 - 1, y1 - 1, x2, y2), str(one['name']), difficult=is_difficult))
    return size, objects


def _read_voc(where: str, spec: str, is_training: bool) -> DetectionDataset:
    """Read 'ROOT[:YEAR]', a folder that contains VOCdevkit."""
    root, parts = _voc_parts(where, spec, is_training)
    images = []
    for year, image_set in parts:
        with usage_errors(f'{where}, {image_set} of {year}'):
            voc = VOCDetection(root, year=year, image_set=image_set)
        images += [
            (image, *_read_voc_annotation(path)) for image, path in zip(voc.images, voc.annotations, strict=True)]
    classes = sorted({one.name for _, _, objects in images for one in objects})
    return DetectionDataset(where, images, classes)


def _load(option: str, data: str, is_training: bool, count: int | None) -> DetectionDataset:
    where = f'{option} {data}'
    kind, _, rest = data.partition(':')
    if data == SCENES:
        return scenes('train' if is_training else 'test', count)
    if kind not in ('coco', 'voc') or not rest:
        raise UsageError(f'{where}: choose from {SCENES}, coco:IMAGES:ANNOTATIONS.json and voc:ROOT[:YEAR].')
    dataset = _read_coco(where, rest) if kind == 'coco' else _read_voc(where, rest, is_training)
    dataset.items = dataset.items[:count]
    if not dataset.has_objects:
        raise UsageError(f'{where} has no boxes to {"train" if is_training else "test"} on.')
    return dataset


def load_splits(
        data: str, test_data: str | None, num_train: int | None = None, num_test: int | None = None,
) -> tuple[DetectionDataset, DetectionDataset]:
    """Load and check training and test images from the values of --data and --test-data.

    Raises:
        UsageError: if the data do not exist or are invalid, or if there is nothing to train or test on.
    """
    if data.startswith('coco:') and test_data is None:
        raise UsageError(f'--data {data} has no test split. Add --test-data coco:IMAGES:ANNOTATIONS.json.')
    train = _load('--data', data, True, num_train)
    test = _load('--data' if test_data is None else '--test-data', test_data or data, False, num_test)
    test.match_classes(train.classes)
    return train, test
