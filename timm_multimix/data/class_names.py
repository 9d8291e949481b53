"""Class names of datasets and models, and the mapping between them."""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .image_files import listed


def dataset_classes(dataset: Any) -> dict[str, int] | None:
    """Return the class names of a dataset or wrapped dataset and their indices, None if it has no class names."""
    while dataset is not None:
        for source in (dataset, getattr(dataset, 'reader', None)):
            for attribute in ('class_to_idx', 'class_name_to_idx'):
                classes = getattr(source, attribute, None)
                if classes and isinstance(classes, Mapping):
                    return {str(name): int(index) for name, index in classes.items()}
        dataset = getattr(dataset, 'dataset', None)
    return None


def ordered_names(classes: Mapping[str, int] | None, num_classes: int) -> list[str] | None:
    """Return the class names in order; None unless each class has exactly one name."""
    names = {index: name for name, index in (classes or {}).items()}
    if sorted(names) != list(range(num_classes)) or len(names) != len(classes):
        return None
    return [names[index] for index in range(num_classes)]


def valid_classes(value: Any) -> dict[str, int] | None:
    """Convert a list of class names, or a mapping of names to indices, to a dict; None for other values."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {name: index for index, name in enumerate(value)} if len(set(map(str, value))) == len(value) else None
    if not value or not isinstance(value, Mapping):
        return None
    if not all(isinstance(name, str) and isinstance(index, int) and index >= 0 for name, index in value.items()):
        return None
    return dict(value)


def class_mapping(classes: Mapping[str, int], known: Mapping[str, int]) -> dict[int, int]:
    """Map the class indices of a dataset to those of a model, by name.

    Raises:
        ValueError: if the model lacks a class, or has different classes for two names of one class.
    """
    if unknown := [name for name in classes if name not in known]:
        raise ValueError(f'the model lacks {len(unknown)} of the classes: {listed(unknown)}')
    mapping: dict[int, int] = {}
    for name, index in classes.items():
        if mapping.setdefault(index, known[name]) != known[name]:
            raise ValueError(f'two names of class {index}, one of them {name}, are different classes of the model')
    return mapping


def map_targets(dataset: Any, mapping: Mapping[int, int]) -> None:
    """Make a dataset, or the dataset in a wrapper, return mapped class indices. The dataset is changed in place."""
    if all(index == mapped for index, mapped in mapping.items()):
        return
    while not hasattr(dataset, 'target_transform') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    dataset.target_transform = partial(_map_target, dict(mapping), dataset.target_transform)


def _map_target(mapping: Mapping[int, int], transform: Callable | None, target: Any) -> Any:
    target = mapping[int(target)]
    return target if transform is None else transform(target)
