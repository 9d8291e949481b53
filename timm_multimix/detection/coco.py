"""Reader of COCO annotation files."""
import json
import os
from typing import Any

from ..common.errors import UsageError, usage_errors
from .datasets import Annotated, DetectionDataset, check_files, checked_box

_FIELDS = dict(
    images=('id', 'file_name', 'width', 'height'), categories=('id', 'name'),
    annotations=('image_id', 'category_id', 'bbox'))


def _load(path: str, where: str) -> dict[str, list[dict[str, Any]]]:
    """The file's lists, whose entries have the fields that are needed."""
    with usage_errors(where), open(path, encoding='utf-8') as file:
        content = json.load(file)
    for section, names in _FIELDS.items():
        entries = content.get(section) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UsageError(f'{where}: a COCO file has the lists {", ".join(_FIELDS)}; {section} is missing.')
        for index, entry in enumerate(entries):
            missing = [name for name in names if not isinstance(entry, dict) or name not in entry]
            if missing:
                raise UsageError(f'{where}: entry {index} of {section} has no {" and no ".join(missing)}.')
    return content


def _by_id(entries: list[dict[str, Any]], section: str, where: str) -> dict[Any, dict[str, Any]]:
    found = {}
    for entry in entries:
        if entry['id'] in found:
            raise UsageError(f'{where}: {section} has the id {entry["id"]!r} twice.')
        found[entry['id']] = entry
    return found


def _labels(categories: dict[Any, dict], classes: tuple[str, ...] | None, where: str) -> tuple[dict, tuple[str, ...]]:
    """The label of each category id, and the class names. Ids may have gaps; names decide across files."""
    names = [str(category['name']) for category in categories.values()]
    if len(set(names)) < len(names):
        raise UsageError(f'{where}: two categories have the same name.')
    if classes is None:
        ordered = sorted(categories, key=lambda key: (str(type(key)), key))
        classes = tuple(str(categories[key]['name']) for key in ordered)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UsageError(f'{where}: the training data have no class {", ".join(unknown[:5])}.')
    return {key: classes.index(str(category['name'])) + 1 for key, category in categories.items()}, classes


def _object(annotation: dict[str, Any], label: int, size: tuple[int, int], where: str) -> tuple:
    """Box, label, area, iscrowd and difficult of an annotation."""
    box = annotation['bbox']
    with usage_errors(f'{where}: bbox {box!r} must be [x, y, width, height]'):
        x, y, width, height = map(float, box)
    box = checked_box((x, y, x + width, y + height), size, where)
    with usage_errors(f'{where}: area or iscrowd'):
        area = float(annotation.get('area') or width * height)
        return box, label, area, int(bool(annotation.get('iscrowd', 0))), False


def read_coco(where: str, spec: str, classes: tuple[str, ...] | None) -> DetectionDataset:
    """Read 'IMAGES:ANNOTATIONS.json': a folder of images and a COCO file.

    Args:
        where: Name of the option, for messages.
        spec: The folder and the file.
        classes: Class names of the training data, None for those of the file.

    Raises:
        UsageError: if the file is not a COCO file, or does not fit the images.
    """
    folder, _, path = spec.rpartition(':')
    if not folder or not path:
        raise UsageError(f'{where}: give a folder and a file, coco:IMAGES:ANNOTATIONS.json.')
    if not os.path.isdir(folder):
        raise UsageError(f'{where}: {folder} is not a folder.')
    with usage_errors(where):
        return _dataset(_load(path, where), folder, classes, where)


def _dataset(
        content: dict[str, list[dict[str, Any]]], folder: str, classes: tuple[str, ...] | None, where: str,
) -> DetectionDataset:
    """The images of a COCO file that lie in a folder."""
    images = _by_id(content['images'], 'images', where)
    labels, classes = _labels(_by_id(content['categories'], 'categories', where), classes, where)
    sizes, objects = {}, {key: [] for key in images}
    for key, image in images.items():
        with usage_errors(f'{where}: width and height of image {key!r}'):
            sizes[key] = int(image['width']), int(image['height'])
            if min(sizes[key]) < 1:
                raise ValueError(f'must be 1 or more, got {sizes[key]}.')
    for index, annotation in enumerate(content['annotations']):
        place = f'{where}: annotation {annotation.get("id", index)!r}'
        if annotation['image_id'] not in images:
            raise UsageError(f'{place} is of image {annotation["image_id"]!r}, which is not in the file.')
        if annotation['category_id'] not in labels:
            raise UsageError(f'{place} is of category {annotation["category_id"]!r}, which is not in the file.')
        key = annotation['image_id']
        objects[key].append(_object(annotation, labels[annotation['category_id']], sizes[key], place))
    paths = {key: os.path.join(folder, str(image['file_name'])) for key, image in images.items()}
    check_files(list(paths.values()), where)
    return DetectionDataset(where, [Annotated.build(paths[key], sizes[key], objects[key]) for key in images], classes)
