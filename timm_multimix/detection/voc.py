"""Reader of Pascal VOC folders, by torchvision's VOCDetection."""
import os
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection

from ..common.errors import UsageError, usage_errors
from .datasets import Annotated, DetectionDataset, check_files, checked_box

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


def _has_test_split(root: str, year: str) -> bool:
    return year == '2007' and os.path.isfile(os.path.join(_folder(root, year), 'ImageSets', 'Main', 'test.txt'))


def _image_sets(root: str, years: list[str], is_training: bool) -> list[tuple[str, str]]:
    """Years and image sets of a split: trainval and test of years with a public test split, else train and val.

    With several years, the training split is trainval of all if one has a test split, as is usual with 2007+2012.
    """
    tested = [year for year in years if _has_test_split(root, year)]
    if tested:
        return [(year, 'trainval') for year in years] if is_training else [(year, 'test') for year in tested]
    return [(year, 'train' if is_training else 'val') for year in years]


def _objects(annotation: dict, size: tuple[int, int], path: str) -> list[tuple]:
    """Box, class name, area, iscrowd and difficult of each object. VOC counts pixels from 1, both ends included."""
    objects = []
    for index, one in enumerate(annotation.get('object', [])):
        place = f'{path}: object {index + 1}'
        with usage_errors(f'{place} needs a name and a bndbox with xmin, ymin, xmax and ymax'):
            name, corners = str(one['name']), [float(one['bndbox'][side]) for side in ('xmin', 'ymin', 'xmax', 'ymax')]
        box = checked_box((corners[0] - 1, corners[1] - 1, *corners[2:]), size, place)
        area = (box[2] - box[0]) * (box[3] - box[1])
        objects.append((box, name, area, 0, str(one.get('difficult', '0')).strip() == '1'))
    return objects


def read_voc(where: str, spec: str, is_training: bool, classes: tuple[str, ...] | None) -> DetectionDataset:
    """Read 'ROOT[:YEAR]', a folder that contains VOCdevkit.

    Args:
        where: Name of the option, for messages.
        spec: The folder, and a year or years joined by '+'.
        is_training: Whether to read the training split or the test split.
        classes: Class names of the training data, None for the sorted names in this split.

    Raises:
        UsageError: if files are missing or wrong.
    """
    root, years = _years(where, spec)
    found = []
    for year, image_set in _image_sets(root, years, is_training):
        with usage_errors(f'{where}, {image_set} of {year}'):
            voc = VOCDetection(root, year=year, image_set=image_set)
        check_files(list(voc.images), where)
        for image, path in zip(voc.images, voc.annotations, strict=True):
            with usage_errors(path):
                try:
                    annotation = VOCDetection.parse_voc_xml(ElementTree.parse(path).getroot())['annotation']
                except ElementTree.ParseError as error:
                    raise UsageError(f'{path} is not XML: {error}.') from error
                size = int(annotation['size']['width']), int(annotation['size']['height'])
                if min(size) < 1:
                    raise UsageError(f'{path}: the size must be 1 or more, got {size}.')
            found.append((image, size, _objects(annotation, size, path)))
    names = {name for *_, objects in found for _, name, *_ in objects}
    if classes is None:
        classes = tuple(sorted(names))
    if names - set(classes):
        raise UsageError(f'{where}: the training data have no class {", ".join(sorted(names - set(classes))[:5])}.')
    labels = {name: index + 1 for index, name in enumerate(classes)}
    items = [
        Annotated.build(image, size, [(box, labels[name], *rest) for box, name, *rest in objects])
        for image, size, objects in found]
    return DetectionDataset(where, items, classes)
