"""Names of classes: those of a dataset, those of a model, and the mapping from one to the other."""
from collections.abc import Mapping, Sequence
from typing import Any

from .image_files import listed


def dataset_classes(dataset: Any) -> dict[str, int] | None:
    """The class names of a dataset and their indices; None if it does not name its classes.

    Args:
        dataset: A dataset of timm, torchvision or this package, or one that wraps it.
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
    """Names of the classes in order, if there is exactly one for each."""
    names = {index: name for name, index in (classes or {}).items()}
    if sorted(names) != list(range(num_classes)) or len(names) != len(classes):
        return None
    return [names[index] for index in range(num_classes)]


def valid_classes(value: Any) -> dict[str, int] | None:
    """Class names from a file: a mapping of names to indices, or a list of names; None if they are neither."""
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
        ValueError: if the model does not know a class, with the names.
    """
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise ValueError(f'the model does not know {len(unknown)} of them: {listed(unknown)}')
    mapping: dict[int, int] = {}
    for name, index in classes.items():
        if mapping.setdefault(index, known[name]) != known[name]:
            raise ValueError(f'two names of class {index} are different classes of the model: {name} is one of them')
    return mapping


def map_targets(dataset: Any, mapping: Mapping[int, int]) -> None:
    """Let a dataset return the class indices of a model.

    Args:
        dataset: The dataset, changed in place; a wrapped one is changed inside.
        mapping: Index of the model for each index of the dataset.
    """
    if all(index == mapped for index, mapped in mapping.items()):
        return
    while not hasattr(dataset, 'target_transform') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    dataset.target_transform = _MapTarget(mapping, dataset.target_transform)


class _MapTarget:
    """A target transform that maps class indices, then applies another one."""

    def __init__(self, mapping: Mapping[int, int], transform: Any):
        self.mapping = dict(mapping)
        self.transform = transform

    def __call__(self, target: Any) -> Any:
        target = self.mapping[int(target)]
        return target if self.transform is None else self.transform(target)
