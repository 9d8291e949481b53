"""Reader of COCO annotation files."""
import json
import os
from collections.abc import Sequence
from typing import Any

from ..common.errors import UsageError, usage_errors
from .datasets import DetectionDataset, Object, Size, checked_box, checked_size

_FIELDS = dict(
    images=('id', 'file_name', 'width', 'height'), categories=('id', 'name'),
    annotations=('image_id', 'category_id', 'bbox'))


def _load(path: str, where: str) -> dict[str, list[dict[str, Any]]]:
    """The file's lists, whose entries have the fields that are needed."""
    with open(path, encoding='utf-8') as file:
        content = json.load(file)
    for section, names in _FIELDS.items():
        entries = content.get(section) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UsageError(f'{where}: a COCO file has the lists {", ".join(_FIELDS)}; {section} is missing.')
        for index, entry in enumerate(entries):
            missing = [name for name in names if not isinstance(entry, dict) or name not in entry]
            if missing:
                raise UsageError(f'{where}: entry {index} of {section} has no {" and no ".join(missing)}.')
        ids = [entry['id'] for entry in entries if 'id' in names]
        if len(set(ids)) < len(ids):
            raise UsageError(f'{where}: {section} has an id twice.')
    return content


def _object(annotation: dict[str, Any], name: str, size: Size, where: str) -> Object:
    with usage_errors(f'{where}: bbox must be [x, y, width, height], got {annotation["bbox"]!r}; area or iscrowd'):
        x, y, width, height = map(float, annotation['bbox'])
        area = float(annotation.get('area') or width * height)
        is_crowd = bool(annotation.get('iscrowd', 0))
    return Object(checked_box((x, y, x + width, y + height), size, where), name, area, is_crowd)


def _dataset(
        content: dict[str, list[dict[str, Any]]], folder: str, known: Sequence[str] | None, where: str,
) -> DetectionDataset:
    names = {entry['id']: str(entry['name']) for entry in sorted(
        content['categories'], key=lambda entry: (str(type(entry['id'])), entry['id']))}
    if len(set(names.values())) < len(names):
        raise UsageError(f'{where}: two categories have the same name.')
    images: dict[Any, Any] = {}
    for entry in content['images']:
        with usage_errors(f'{where}: image {entry["id"]!r}'):
            size = checked_size(entry['width'], entry['height'])
        images[entry['id']] = os.path.join(folder, str(entry['file_name'])), size, []
    for index, annotation in enumerate(content['annotations']):
        place = f'{where}: annotation {annotation.get("id", index)!r}'
        for kind, entries in (('image', images), ('category', names)):
            key = annotation[f'{kind}_id']
            if key not in entries:
                raise UsageError(f'{place} is of {kind} {key!r}, which is not in the file.')
        _, size, objects = images[annotation['image_id']]
        objects.append(_object(annotation, names[annotation['category_id']], size, place))
    return DetectionDataset(where, images.values(), list(names.values()), known)


def read_coco(where: str, spec: str, known: Sequence[str] | None) -> DetectionDataset:
    """Read 'IMAGES:ANNOTATIONS.json': a folder of images and a COCO file.

    Args:
        where: Name of the option, for messages.
        spec: The folder and the file.
        known: Class names of the training data, None for those of the file, sorted by id.
    """
    folder, _, path = spec.rpartition(':')
    if not folder or not path:
        raise UsageError(f'{where}: give a folder and a file, coco:IMAGES:ANNOTATIONS.json.')
    if not os.path.isdir(folder):
        raise UsageError(f'{where}: {folder} is not a folder.')
    with usage_errors(where):
        return _dataset(_load(path, where), folder, known, where)
