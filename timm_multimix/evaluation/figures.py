"""Pictures of a report, as PNG in a data URI."""
import base64
import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .suite import Result

_WIDTH, _HEIGHT = 3.6, 3.2  # of one panel, in inches
_DPI = 90


def _panels(count: int, rows: int = 1, height: float = _HEIGHT) -> tuple[Figure, list[Axes]]:
    # no pyplot: it would keep every figure, and choose a window system
    figure = Figure(figsize=(_WIDTH * count, height * rows), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, count, squeeze=False)
    return figure, list(axes.flat)


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=_DPI)
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode('ascii')


def reliability_figure(results: Sequence[Result]) -> str:
    """Accuracy against confidence, before a temperature and after it."""
    figure, axes = _panels(len(results))
    for axis, result in zip(axes, results, strict=True):
        tempered = result.values['tempered'].get('reliability')
        before = result.values['reliability']
        width = 1 / len(before['count'])
        axis.plot([0, 1], [0, 1], color='0.6', linestyle='--', linewidth=1)
        axis.bar([width * (k + 0.5) for k in range(len(before['count']))], before['accuracy'], 0.9 * width,
                 color='tab:blue', alpha=0.4, label='accuracy')
        axis.plot(before['confidence'], before['accuracy'], 'o-', color='tab:blue', markersize=3, label='as it is')
        if tempered:
            axis.plot(tempered['confidence'], tempered['accuracy'], 's-', color='tab:orange', markersize=3,
                      label='at temperature')
        axis.set(title=result.name, xlabel='confidence', ylabel='accuracy', xlim=(0, 1), ylim=(0, 1))
        axis.legend(fontsize=7)
    return _data_uri(figure)


def attacks_figure(results: Sequence[Result]) -> str:
    """Accuracy over the size of the attacks."""
    figure, axes = _panels(2)
    for axis, attack in zip(axes, ('fgsm', 'pgd'), strict=True):
        for result in results:
            curve = result.values['attacks']
            axis.plot(curve['epsilon_of_255'], curve[attack], 'o-', markersize=3, label=result.name)
        axis.set(title=attack.upper(), xlabel='epsilon, of 255', ylabel='accuracy %', ylim=(0, 101))
    axes[0].legend(fontsize=7)
    return _data_uri(figure)


def ood_figure(results: Sequence[Result], score: str) -> str:
    """Distributions of a score, of images inside and outside; a row for each model."""
    sources = list(results[0].pictures['scores']['outside'])
    figure, axes = _panels(len(sources), len(results), 2.2)
    for row, result in enumerate(results):
        scores = result.pictures['scores']
        for axis, source in zip(axes[row * len(sources):], sources, strict=False):
            inside, outside = scores['inside'][score], scores['outside'][source][score]
            both = torch.cat([inside, outside])
            bins = torch.linspace(both.min(), both.max() + 1e-9, 41, device='cpu').tolist()
            for values, label in ((inside, 'inside'), (outside, 'outside')):
                axis.hist(values.tolist(), bins, density=True, alpha=0.5, label=label)
            axis.set_title(f'{result.name}: {source}', fontsize=8)
            axis.set_yticks([])
    axes[0].legend(fontsize=7)
    return _data_uri(figure)


def embeddings_figure(results: Sequence[Result]) -> str:
    """The 2-D picture of embeddings, coloured by class."""
    figure, axes = _panels(len(results))
    for axis, result in zip(axes, results, strict=True):
        points, classes = result.pictures['points'], result.pictures['classes']
        colours = 'tab10' if classes.max() < 10 else 'nipy_spectral'
        axis.scatter(*points.T.tolist(), c=classes.tolist(), cmap=colours, s=6)
        axis.set(title=result.name, xticks=[], yticks=[])
    return _data_uri(figure)


def between_figure(results: Sequence[Result]) -> str:
    """Confidence and entropy along the way between two images."""
    figure, axes = _panels(2)
    for axis, name in zip(axes, ('confidence', 'entropy'), strict=True):
        for result in results:
            axis.plot(result.values['between']['shares'], result.values['between'][name], 'o-', markersize=3,
                      label=result.name)
        axis.set(xlabel='share of the first image', ylabel=name, ylim=(0, None))
    axes[0].legend(fontsize=7)
    return _data_uri(figure)


def attention_figure(results: Sequence[Result]) -> str:
    """Sample images, and below them each model's attention over them."""
    images = results[0].pictures['images']
    figure, axes = _panels(len(images), 1 + len(results), 1.2)
    figure.set_size_inches(1.2 * len(images), 1.3 * (1 + len(results)))
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    for axis, image in zip(axes, images, strict=False):
        axis.imshow(image.movedim(0, -1).expand(-1, -1, 3).numpy())
    for row, result in enumerate(results, 1):
        axes[row * len(images)].set_ylabel(result.name, fontsize=6)
        size = result.pictures['images'].shape[-2:]
        maps = F.interpolate(result.pictures['maps'][:, None], size, mode='nearest')[:, 0]
        for axis, image, weights in zip(axes[row * len(images):], result.pictures['images'], maps, strict=False):
            axis.imshow(image.mean(0).numpy(), cmap='gray', vmin=0, vmax=1)
            axis.imshow(weights.numpy(), cmap='inferno', alpha=0.6, vmin=0)
    return _data_uri(figure)
