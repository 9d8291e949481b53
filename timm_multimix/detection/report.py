"""Results of a comparison: rows that survive an interruption, a table, JSON and figures."""
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..common.errors import UsageError, usage_errors
from ..common.figures import as_png, panels
from ..common.files import json_values, lock_folder
from ..common.results import RESULTS, write_file, write_results
from .backbones import Source
from .datasets import DetectionDataset
from .metric import MEASURES

_FIGURE_IMAGES = 6


class Comparison:
    """Rows of a comparison, one for each backbone and seed, in the file results.json of a folder.

    Args:
        folder: The folder. A comparison in it is continued.
        conditions: What all rows have in common: the data and the settings.

    Attributes:
        models: For each origin of a backbone its name, description and rows by seed.

    Raises:
        UsageError: if the folder holds the results of other conditions, or a file that is no comparison.
    """

    def __init__(self, folder: str, conditions: Mapping[str, Any]):
        self.folder = folder
        self.conditions = json.loads(json.dumps(conditions))
        self.models: dict[str, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        path = os.path.join(self.folder, RESULTS)
        if not os.path.exists(path):
            return
        with usage_errors(f'--output {self.folder}: {RESULTS}'), open(path, encoding='utf-8') as file:
            content = json.load(file)
        if not isinstance(content, dict) or not {'conditions', 'models'} <= content.keys():
            raise UsageError(f'--output {self.folder}: its {RESULTS} is not of a comparison of detectors. Choose '
                             'another folder.')
        for part, values in self.conditions.items():
            before = content['conditions'].get(part, {})
            changed = [f'{name} was {before.get(name)}, is {value}' for name, value in values.items()
                       if before.get(name) != value]
            if changed:
                raise UsageError(f'--output {self.folder} holds results of other options: {"; ".join(changed)}. '
                                 'Choose another folder, or the same options.')
        self.models = {model['origin']: {**model, 'name': name} for name, model in content['models'].items()}

    def open(self, sources: Sequence[Source]) -> list[str]:
        """Lock the folder until the process ends, and add backbones.

        Returns:
            The origins of backbones with rows of other weights. These rows are dropped.

        Raises:
            UsageError: if another process uses the folder.
        """
        with usage_errors(f'--output {self.folder}'):
            os.makedirs(self.folder, exist_ok=True)
            lock_folder(self.folder, '--output')
        self._read()  # another process may have added rows before it released the lock
        changed = []
        for source in sources:
            about = dict(name=source.name, origin=source.origin, weights=source.weights, digest=source.digest)
            known = self.models.get(source.origin, {})
            rows = known.get('seeds', {})
            if rows and any(known[name] != about[name] for name in ('weights', 'digest')):
                changed.append(source.origin)
                rows = {}
            self.models[source.origin] = dict(about, seeds=rows)
        return changed

    def has(self, source: Source, seed: int) -> bool:
        """Whether the row of a backbone and a seed is there."""
        return str(seed) in self.models[source.origin]['seeds']

    def add(self, source: Source, seed: int, row: Mapping[str, float]) -> None:
        """Add a row and write the file."""
        self.models[source.origin]['seeds'][str(seed)] = json_values(dict(row))
        models = {}
        for model in self._finished():
            about = {name: model[name] for name in ('origin', 'weights', 'digest')}
            # Short names are unique within one comparison only.
            name = model['origin'] if model['name'] in models else model['name']
            models[name] = {**about, **_summary(model), 'seeds': model['seeds']}
        write_results(self.folder, conditions=self.conditions, models=models)

    def _finished(self) -> list[dict[str, Any]]:
        return [model for model in self.models.values() if model['seeds']]

    def table(self) -> str:
        """The comparison as text: mean and standard deviation over the seeds."""
        rows = [['backbone', 'weights', 'seeds', *(name.replace('_', ' ') for name in MEASURES.values())]]
        for model in self._finished():
            summary = _summary(model)
            cells = []
            for name in MEASURES.values():
                mean, deviation = summary[name], summary['std'][name]
                spread = '' if deviation is None else f' ± {deviation:.3f}'
                cells.append('-' if mean is None else f'{mean:.3f}{spread}')
            rows.append([model['name'], model['weights'], str(len(model['seeds'])), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _summary(model: Mapping[str, Any]) -> dict[str, Any]:
    """Mean of each measure over the seeds, and its standard deviation."""
    means, deviations = {}, {}
    for name in MEASURES.values():
        values = [row[name] for row in model['seeds'].values() if row[name] is not None]
        means[name] = statistics.mean(values) if values else None
        deviations[name] = statistics.stdev(values) if len(values) > 1 else None
    return {**means, 'std': deviations}


@as_png
def _figure(
        name: str, dataset: DetectionDataset, predictions: Sequence[Mapping[str, torch.Tensor]],
        targets: Sequence[Mapping[str, torch.Tensor]],
) -> Figure:
    figure, axes = panels(min(_FIGURE_IMAGES, len(dataset)), 3.2, 3.3)
    for index, axis in enumerate(axes):
        axis.axis('off')
        axis.imshow(dataset.view('RGB')[index][0].permute(1, 2, 0).numpy())
        num_true = len(targets[index]['boxes'])
        for objects, colour, style in ((targets[index], 'lime', '-'), (predictions[index], 'red', '--')):
            for (x1, y1, x2, y2), label in zip(objects['boxes'][:num_true].tolist(), objects['labels'], strict=False):
                axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, ls=style))
                axis.text(x1, y1 if style == '-' else y2, dataset.classes[label - 1], color=colour, fontsize=8)
    figure.suptitle(f'{name}: true boxes (green), best predictions (red, dashed)', fontsize=9)
    return figure


def draw_predictions(folder: str, name: str, *content: Any) -> None:
    """Draw true boxes and as many of the best predictions on the first images of a dataset.

    Args:
        folder: Folder of the figure.
        name: Name of the backbone.
        *content: The dataset, and predictions and true objects of its images.
    """
    write_file(folder, f'predictions-{quote(name, safe="")}.png', _figure(name, *content))
