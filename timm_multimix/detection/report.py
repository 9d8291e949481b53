"""Results of a comparison: rows that survive an interruption, a table, JSON and figures."""
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

import timm
import torch
import torchvision

from ..common.errors import UsageError, usage_errors
from ..common.files import json_values, replacing
from ..version import __version__
from .backbones import Source
from .datasets import DetectionDataset
from .metric import MEASURES

RESULTS = 'results.json'
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
        path = os.path.join(folder, RESULTS)
        if not os.path.exists(path):
            return
        with usage_errors(f'--output {folder}: {RESULTS}'), open(path, encoding='utf-8') as file:
            content = json.load(file)
        if not isinstance(content, dict) or not {'conditions', 'models'} <= content.keys():
            raise UsageError(f'--output {folder}: its {RESULTS} is not of a comparison of detectors. Choose another '
                             'folder.')
        for part, values in self.conditions.items():
            before = content['conditions'].get(part, {})
            changed = [f'{name} was {before.get(name)}, is {value}' for name, value in values.items()
                       if before.get(name) != value]
            if changed:
                raise UsageError(f'--output {folder} holds results of other options: {"; ".join(changed)}. Choose '
                                 'another folder, or the same options.')
        self.models = {model['origin']: {**model, 'name': name} for name, model in content['models'].items()}

    def add_source(self, source: Source) -> bool:
        """Note a backbone. Returns whether there were rows of other weights, which are dropped."""
        known = self.models.get(source.origin, {})
        same = known.get('weights') == source.weights and known.get('digest') == source.digest
        seeds = known.get('seeds', {}) if same else {}
        self.models[source.origin] = dict(
            name=source.name, origin=source.origin, weights=source.weights, digest=source.digest, seeds=seeds)
        return bool(known.get('seeds')) and not same

    def has(self, source: Source, seed: int) -> bool:
        """Whether the row of a backbone and a seed is there."""
        return str(seed) in self.models[source.origin]['seeds']

    def add(self, source: Source, seed: int, row: Mapping[str, float]) -> None:
        """Add a row and write the file."""
        self.models[source.origin]['seeds'][str(seed)] = json_values(dict(row))
        document = dict(
            date=datetime.now().astimezone().isoformat(timespec='seconds'),
            versions=dict(timm_multimix=__version__, timm=timm.__version__, torch=torch.__version__,
                          torchvision=torchvision.__version__),
            conditions=self.conditions, models={model['name']: self._summary(model) for model in self._finished()})
        with usage_errors(f'--output {self.folder}'):
            os.makedirs(self.folder, exist_ok=True)
            path = os.path.join(self.folder, RESULTS)
            with replacing(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
                json.dump(document, file, indent=2, allow_nan=False)

    def _finished(self) -> list[dict[str, Any]]:
        return [model for model in self.models.values() if model['seeds']]

    @staticmethod
    def _summary(model: Mapping[str, Any]) -> dict[str, Any]:
        means, deviations = {}, {}
        for name in MEASURES.values():
            values = [row[name] for row in model['seeds'].values() if row[name] is not None]
            means[name] = statistics.mean(values) if values else None
            deviations[name] = statistics.stdev(values) if len(values) > 1 else None
        about = {name: model[name] for name in ('origin', 'weights', 'digest')}
        return {**about, **means, 'std': deviations, 'seeds': model['seeds']}

    def table(self) -> str:
        """The comparison as text: mean and standard deviation over the seeds."""
        rows = [['backbone', 'weights', 'seeds', *(name.replace('_', ' ') for name in MEASURES.values())]]
        for model in self._finished():
            summary = self._summary(model)
            cells = []
            for name in MEASURES.values():
                mean, deviation = summary[name], summary['std'][name]
                spread = '' if deviation is None else f' ± {deviation:.3f}'
                cells.append('-' if mean is None else f'{mean:.3f}{spread}')
            rows.append([model['name'], model['weights'], str(len(model['seeds'])), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return '\n'.join('  '.join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def draw_predictions(
        folder: str,
        name: str,
        dataset: DetectionDataset,
        predictions: Sequence[Mapping[str, torch.Tensor]],
        targets: Sequence[Mapping[str, torch.Tensor]],
) -> str:
    """Draw true boxes and as many of the best predictions on the first images of a dataset.

    Returns:
        Path of the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count = min(_FIGURE_IMAGES, len(dataset))
    figure = Figure(figsize=(3.2 * math.ceil(count / 2), 6.6), layout='constrained')
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, math.ceil(count / 2), squeeze=False).flat)
    for axis in axes:
        axis.axis('off')
    for index, axis in zip(range(count), axes, strict=False):
        axis.imshow(dataset.view('RGB')[index][0].permute(1, 2, 0).numpy())
        num_true = len(targets[index]['boxes'])
        for boxes, labels, colour, style in (
                (targets[index]['boxes'], targets[index]['labels'], 'lime', '-'),
                (predictions[index]['boxes'][:num_true], predictions[index]['labels'][:num_true], 'red', '--')):
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, ls=style))
                axis.text(x1, y1 if style == '-' else y2, dataset.classes[label - 1], color=colour, fontsize=8,
                          parse_math=False)
    figure.suptitle(f'{name}: true boxes (green), best predictions (red, dashed)', fontsize=9, parse_math=False)
    path = os.path.join(folder, f'predictions-{quote(name, safe="")}.png')
    with usage_errors(f'--output {folder}'):
        os.makedirs(folder, exist_ok=True)
        with replacing(path) as temporary:
            figure.savefig(temporary, format='png', dpi=100)
    return path
