"""Training and test images by name: the embedded scenes, COCO files and Pascal VOC folders."""
import statistics

from ..common.errors import UsageError
from ..data.demo import DEMO_PREFIX
from ..data.scenes import CLASSES, SCENE_SIZE, render_scenes
from .coco import read_coco
from .datasets import Annotated, DetectionDataset
from .voc import read_voc

SCENES = f'{DEMO_PREFIX}scenes'
_NUM_SCENES = dict(train=800, validation=300, test=300)


def scenes(split: str, count: int | None = None, seed: int = 0) -> DetectionDataset:
    """The embedded scenes of a split."""
    items = []
    for scene in render_scenes(split, count or _NUM_SCENES[split], seed):
        box_areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in scene.boxes.tolist()]
        objects = [(box, label + 1, area, 0, False) for box, label, area in zip(
            scene.boxes.tolist(), scene.labels.tolist(), box_areas, strict=True)]
        items.append(Annotated.build(scene.image, (SCENE_SIZE, SCENE_SIZE), objects))
    return DetectionDataset(f'{SCENES} ({split})', items, CLASSES)


def image_bounds(dataset: DetectionDataset, min_size: int | None = None) -> tuple[int, int]:
    """torchvision's min_size and max_size for a dataset.

    Args:
        dataset: The training images.
        min_size: Shorter side, None for the median of the images. The longer side is at most 1333/800 of it.
    """
    shorter = min_size or statistics.median_low([min(size) for size in dataset.sizes])
    return shorter, round(shorter * 1333 / 800)


def load_splits(
        data: str, test_data: str | None, num_train: int | None = None, num_test: int | None = None,
) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and test images, checked.

    Args:
        data: 'demo/scenes', 'coco:IMAGES:ANNOTATIONS.json' or 'voc:ROOT[:YEAR]'.
        test_data: The same for the test images. None stands for the test split of `data`, which COCO files lack.
        num_train: Number of scenes, or limit of the number of images; None for the default, or all.
        num_test: The same for the test images.

    Raises:
        UsageError: if the data are not there or wrong, or there is nothing to train on.
    """
    kind = data.partition(':')[0]
    if kind == 'coco' and test_data is None:
        raise UsageError(f'--data {data} has no test split. Add --test-data coco:IMAGES:ANNOTATIONS.json.')

    def read(option: str, value: str, is_training: bool, classes: tuple[str, ...] | None) -> DetectionDataset:
        kind, _, rest = value.partition(':')
        count = num_train if is_training else num_test
        where = f'{option} {value}'
        if value == SCENES:
            return scenes('train' if is_training else 'test', count)
        if kind == 'coco' and rest:
            return read_coco(where, rest, classes).first(count)
        if kind == 'voc' and rest:
            return read_voc(where, rest, is_training, classes).first(count)
        raise UsageError(f'{where}: give {SCENES}, coco:IMAGES:ANNOTATIONS.json or voc:ROOT[:YEAR].')

    train = read('--data', data, True, None)
    if not any(item.trainable.any() for item in train.items):
        raise UsageError(f'--data {data} has no boxes to train on.')
    test = read('--data' if test_data is None else '--test-data', test_data or data, False, train.classes)
    if test.classes != train.classes:
        raise UsageError(f'--test-data {test_data} has other classes than --data {data}.')
    if not any(len(item.boxes) for item in test.items):
        raise UsageError(f'{test.name} has no boxes to test on.')
    return train, test
