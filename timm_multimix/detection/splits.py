"""Training and test images by name: the embedded scenes, COCO files and Pascal VOC folders."""
import statistics
from collections.abc import Sequence

from ..common.errors import UsageError
from ..data.demo import DEMO_PREFIX
from ..data.scenes import CLASSES, SCENE_SIZE, render_scenes
from .coco import read_coco
from .datasets import DetectionDataset, Object
from .voc import read_voc

SCENES = f'{DEMO_PREFIX}scenes'
_NUM_SCENES = dict(train=800, validation=300, test=300)


def scenes(
        split: str, count: int | None = None, seed: int = 0, known: Sequence[str] | None = None) -> DetectionDataset:
    """The embedded scenes of a split."""
    images = []
    for scene in render_scenes(split, count or _NUM_SCENES[split], seed):
        objects = [
            Object((x1, y1, x2, y2), CLASSES[label], (x2 - x1) * (y2 - y1))
            for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True)]
        images.append((scene.image, (SCENE_SIZE, SCENE_SIZE), objects))
    return DetectionDataset(f'{SCENES} ({split})', images, CLASSES, known)


def image_bounds(dataset: DetectionDataset, min_size: int | None = None) -> tuple[int, int]:
    """torchvision's min_size and max_size for training images. The default of min_size is their median shorter side."""
    shorter = min_size or statistics.median_low([min(size) for size in dataset.sizes])
    return shorter, round(shorter * 1333 / 800)


def _load(
        option: str, data: str, is_training: bool, count: int | None, known: Sequence[str] | None) -> DetectionDataset:
    where = f'{option} {data}'
    kind, _, rest = data.partition(':')
    if data == SCENES:
        return scenes('train' if is_training else 'test', count, known=known)
    if kind == 'coco' and rest:
        return read_coco(where, rest, known).first(count)
    if kind == 'voc' and rest:
        return read_voc(where, rest, is_training, known).first(count)
    raise UsageError(f'{where}: give {SCENES}, coco:IMAGES:ANNOTATIONS.json or voc:ROOT[:YEAR].')


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
    if data.startswith('coco:') and test_data is None:
        raise UsageError(f'--data {data} has no test split. Add --test-data coco:IMAGES:ANNOTATIONS.json.')
    train = _load('--data', data, True, num_train, None)
    if not train.has_boxes(training=True):
        raise UsageError(f'--data {data} has no boxes to train on.')
    option = '--data' if test_data is None else '--test-data'
    test = _load(option, test_data or data, False, num_test, train.classes)
    if not test.has_boxes(training=False):
        raise UsageError(f'{test.name} has no boxes to test on.')
    return train, test
