"""Results of a comparison: rows in results.json, a table and figures."""
import hashlib
import json
import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..common.errors import UsageError, usage_errors
from ..common.figures import as_png, panels
from ..common.files import json_values, lock_folder
from ..common.results import RESULTS, write_results
from ..evaluation.models import Candidate
from .datasets import DetectionDataset
from .metric import MEASURES

_logger = logging.getLogger(__name__)

_FIGURE_IMAGES = 6


def _checksum(path: str) -> str | None:
    """Return a checksum of a checkpoint, None for a name of timm or the Hub."""
    if not os.path.isfile(path):
        return None
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()[:16]


class Comparison:
    """Rows of a comparison, one for each backbone and seed, in the file results.json of a folder.

    The folder is locked until the process ends. A comparison in it is continued, except for rows of a backbone that now
    has other weights. `conditions` are the data and settings of all rows. `models` contains for each origin of a
    backbone its name, description and rows by seed.

    Raises:
        UsageError: if another process uses the folder, or if it contains results of other conditions.
    """

    def __init__(self, folder: str, conditions: Mapping[str, Any], sources: Sequence[Candidate]):
        self.folder = folder
        self.conditions = json.loads(json.dumps(conditions))
        with usage_errors(f'--output {folder}'):
            os.makedirs(folder, exist_ok=True)
            lock_folder(folder, '--output')
        self.models = self._read()
        for source in sources:
            digest = _checksum(source.origin)
            about = dict(name=source.name, origin=source.origin, weights=source.weights, digest=digest)
            before = self.models.get(source.origin, dict(about, seeds={}))
            if any(before[name] != about[name] for name in ('weights', 'digest')):
                _logger.warning(f'{source.origin} has other weights than in {folder}. It runs again.')
                before['seeds'] = {}
            self.models[source.origin] = dict(about, seeds=before['seeds'])

    def _read(self) -> dict[str, dict[str, Any]]:
        path = os.path.join(self.folder, RESULTS)
        if not os.path.exists(path):
            return {}
        with usage_errors(f'--output {self.folder}: {RESULTS}'), open(path, encoding='utf-8') as file:
            content = json.load(file)
        if not isinstance(content, dict) or not {'conditions', 'models'} <= content.keys():
            raise UsageError(
                f'--output {self.folder}: its {RESULTS} is not a comparison of detectors. Choose another folder.')
        for part, values in self.conditions.items():
            before = content['conditions'].get(part, {})
            changed = [f'{name} was {before.get(name)}, is {value}' for name, value in values.items()
                       if before.get(name) != value]
            if changed:
                raise UsageError(f'--output {self.folder} contains results of other options: {"; ".join(changed)}. '
                                 'Choose another folder, or the same options.')
        return {model['origin']: {**model, 'name': name} for name, model in content['models'].items()}

    def has(self, source: Candidate, seed: int) -> bool:
        """Return whether the row of a backbone and a seed exists."""
        return str(seed) in self.models[source.origin]['seeds']

    def add(self, source: Candidate, seed: int, row: Mapping[str, float]) -> None:
        """Add a row and write the file."""
        self.models[source.origin]['seeds'][str(seed)] = json_values(dict(row))
        models = {}
        for model in filter(lambda model: model['seeds'], self.models.values()):
            # Short names are only unique within one command.
            name = model['origin'] if model['name'] in models else model['name']
            about = {key: model[key] for key in ('origin', 'weights', 'digest')}
            models[name] = {**about, **_summary(model), 'seeds': model['seeds']}
        write_results(self.folder, conditions=self.conditions, models=models)

    def table(self) -> str:
        """Return the comparison as text, with mean and standard deviation over the seeds."""
        rows = [['backbone', 'weights', 'seeds', *(name.replace('_', ' ') for name in MEASURES.values())]]
        for model in self.models.values():
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
    """Return the mean of each measure over the seeds, and its standard deviation."""
    means, deviations = {}, {}
    for name in MEASURES.values():
        values = [row[name] for row in model['seeds'].values() if row[name] is not None]
        means[name] = statistics.mean(values) if values else None
        deviations[name] = statistics.stdev(values) if len(values) > 1 else None
    return {**means, 'std': deviations}


@as_png
def predictions_figure(
        name: str, dataset: DetectionDataset, predictions: Sequence[Mapping[str, torch.Tensor]],
        targets: Sequence[Mapping[str, torch.Tensor]],
) -> Figure:
    """Draw true boxes and the same number of best predictions of a backbone on the first images of a dataset."""
    figure, axes = panels(min(_FIGURE_IMAGES, len(dataset)), 3.2, 3.3)
    for index, axis in enumerate(axes):
        axis.axis('off')
        axis.imshow(dataset.view('RGB')[index][0].permute(1, 2, 0).numpy())
        num_true = len(targets[index]['boxes'])
        for objects, color, style in ((targets[index], 'lime', '-'), (predictions[index], 'red', '--')):
            for (x1, y1, x2, y2), label in zip(objects['boxes'][:num_true].tolist(), objects['labels'], strict=False):
                axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=color, ls=style))
                axis.text(x1, y1 if style == '-' else y2, dataset.classes[label - 1], color=color, fontsize=8)
    figure.suptitle(f'{name}: true boxes (green), best predictions (red, dashed)', fontsize=9)
    return figure
