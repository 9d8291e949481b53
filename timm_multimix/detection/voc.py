"""Reader of Pascal VOC folders, by torchvision's VOCDetection."""
import os
from collections.abc import Sequence
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection

from ..common.errors import UsageError, usage_errors
from .datasets import DetectionDataset, Object, Size, checked_box, checked_size

_YEARS = tuple(str(year) for year in range(2007, 2013))


def _folder(root: str, year: str) -> str:
    return os.path.join(root, *(['TrainVal'] if year == '2011' else []), 'VOCdevkit', f'VOC{year}')


def _years(where: str, spec: str) -> tuple[str, list[str]]:
    """Root and years of 'ROOT[:YEAR[+YEAR]]'. Without a year, the first of 2007 and 2012 that is there."""
    root, _, given = spec.rpartition(':')
    if not root or not given[:4].isdigit():
        root, given = spec, ''
    if not os.path.isdir(root):
        raise UsageError(f'{where}: {root} is not a folder.')
    years = given.split('+') if given else [
        year for year in ('2007', '2012') if os.path.isdir(_folder(root, year))][:1]
    if not years:
        raise UsageError(f'{where}: neither {_folder(root, "2007")} nor {_folder(root, "2012")} is there.')
    for year in years:
        if year not in _YEARS:
            raise UsageError(f'{where}: years are {", ".join(_YEARS)}, got {year!r}.')
        if not os.path.isdir(_folder(root, year)):
            raise UsageError(f'{where}: {_folder(root, year)} is not there.')
    return root, years


def _image_sets(root: str, years: list[str], is_training: bool) -> list[tuple[str, str]]:
    """Years and image sets of a split: trainval and test of years with a public test split, else train and val.

    With several years, the training split is trainval of all if one has a test split, as is usual with 2007+2012.
    """
    tested = [year for year in years if year == '2007' and os.path.isfile(
        os.path.join(_folder(root, year), 'ImageSets', 'Main', 'test.txt'))]
    if tested:
        return [(year, 'trainval') for year in years] if is_training else [(year, 'test') for year in tested]
    return [(year, 'train' if is_training else 'val') for year in years]


def _read_annotation(path: str) -> tuple[Size, list[Object]]:
    """Size and objects of an image. VOC counts pixels from 1, both ends included."""
    with usage_errors(path):
        try:
            annotation = VOCDetection.parse_voc_xml(ElementTree.parse(path).getroot())['annotation']
        except ElementTree.ParseError as error:
            raise UsageError(f'{path} is not XML: {error}.') from error
        size = checked_size(annotation['size']['width'], annotation['size']['height'])
    objects = []
    for number, one in enumerate(annotation.get('object', []), 1):
        place = f'{path}: object {number}'
        with usage_errors(f'{place} needs a name and a bndbox with xmin, ymin, xmax and ymax'):
            name = str(one['name'])
            x1, y1, x2, y2 = (float(one['bndbox'][side]) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
        x1, y1, x2, y2 = checked_box((x1 - 1, y1 - 1, x2, y2), size, place)
        is_difficult = str(one.get('difficult', '0')).strip() == '1'
        objects.append(Object((x1, y1, x2, y2), name, (x2 - x1) * (y2 - y1), difficult=is_difficult))
    return size, objects


def read_voc(where: str, spec: str, is_training: bool, known: Sequence[str] | None) -> DetectionDataset:
    """Read 'ROOT[:YEAR]', a folder that contains VOCdevkit.

    Args:
        where: Name of the option, for messages.
        spec: The folder, and a year or years joined by '+'.
        is_training: Whether to read the training split or the test split.
        known: Class names of the training data, None for the sorted names in this split.
    """
    root, years = _years(where, spec)
    images = []
    for year, image_set in _image_sets(root, years, is_training):
        with usage_errors(f'{where}, {image_set} of {year}'):
            voc = VOCDetection(root, year=year, image_set=image_set)
        images += [(image, *_read_annotation(path)) for image, path in zip(voc.images, voc.annotations, strict=True)]
    classes = sorted({one.name for _, _, objects in images for one in objects})
    return DetectionDataset(where, images, classes, known)
