"""Class names of datasets and models, and the mapping between them."""
from collections.abc import Mapping, Sequence
from typing import Any

from .image_files import listed


def dataset_classes(dataset: Any) -> dict[str, int] | None:
    """Get the class names of a dataset and their indices; None if the dataset has no class names.

    Args:
        dataset: A dataset of timm, torchvision or this package, or a wrapper of one.
    """
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

    Args:
        classes: Class names of the dataset and their indices.
        known: Class names of the model and their indices.

    Raises:
        ValueError: if the model lacks a class, or has different classes for two names of one class.
    """
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise ValueError(f'the model lacks {len(unknown)} of the classes: {listed(unknown)}')
    mapping: dict[int, int] = {}
    for name, index in classes.items():
        if mapping.setdefault(index, known[name]) != known[name]:
            raise ValueError(f'two names of class {index}, one of them {name}, are different classes of the model')
    return mapping


def map_targets(dataset: Any, mapping: Mapping[int, int]) -> None:
    """Make a dataset return the class indices of a model.

    Args:
        dataset: Dataset, changed in place. For a wrapper, the wrapped dataset is changed.
        mapping: Class index of the model for each class index of the dataset.
    """
    if all(index == mapped for index, mapped in mapping.items()):
        return
    while not hasattr(dataset, 'target_transform') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    dataset.target_transform = _MapTarget(mapping, dataset.target_transform)


class _MapTarget:
    """Target transform that maps class indices and then applies another transform."""

    def __init__(self, mapping: Mapping[int, int], transform: Any):
        self.mapping = dict(mapping)
        self.transform = transform

    def __call__(self, target: Any) -> Any:
        target = self.mapping[int(target)]
        return target if self.transform is None else self.transform(target)
