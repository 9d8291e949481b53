"""Model card for the Hugging Face Hub: README.md with metadata."""
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..common.errors import printable
from ..version import __version__
from .recipe import Recipe

CARD_NAME = 'README.md'
CURVE_NAME = 'training_curve.png'

_MARK = '<!-- Written by timm-multimix.'  # a card with this text can be replaced
_TASK = 'image-classification'

# Fields of the `card:` section of a recipe, and their types.
CARD_FIELDS = dict(
    license=str, license_name=str, license_link=str, datasets=list, dataset_name=str, base_model=str, tags=list,
    language=list, description=str)

# For each metric of timm: type on the Hub, displayed name, and divisor that converts timm's value to the Hub's.
_METRICS = {
    'top1': ('accuracy', 'Top-1 accuracy', 100),
    'top5': ('accuracy', 'Top-5 accuracy', 100),
    'map': ('mean_average_precision', 'Mean average precision', 100),
    'loss': ('loss', 'Loss', 1),
}

_SPECIAL = re.compile(r'[\\`*\[\]~$|]|(?<!\w)_|_(?!\w)')
_ADDRESS = re.compile(r'\b(?:https?|ftp)(?=:)|\bwww(?=\.)', re.IGNORECASE)  # Markdown turns these into links
_ENTITIES = str.maketrans({'&': '&amp;', '<': '&lt;', '>': '&gt;'})

_CITATION = """\
```bibtex
@inproceedings{venkataramanan2023multimix,
  title     = {Embedding Space Interpolation Beyond Mini-Batch, Beyond Pairs and Beyond Examples},
  author    = {Venkataramanan, Shashanka and Kijak, Ewa and Amsaleg, Laurent and Avrithis, Yannis},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  note      = {arXiv:2311.05538}
}

@misc{venkataramanan2022teach,
  title  = {Teach me how to Interpolate a Myriad of Embeddings},
  author = {Venkataramanan, Shashanka and Kijak, Ewa and Amsaleg, Laurent and Avrithis, Yannis},
  year   = {2022},
  note   = {arXiv:2206.14868}
}
```

MultiMix is by Shashanka Venkataramanan, Ewa Kijak, Laurent Amsaleg and Yannis Avrithis.
[timm](https://github.com/huggingface/pytorch-image-models) is by Ross Wightman and contributors. This model was trained
with timm-multimix, an independent implementation of MultiMix for timm."""


def eval_results(
        metrics: Mapping[str, float], dataset_type: str, dataset_name: str, split: str) -> list[EvalResult]:
    """Return the results of a model for the metadata of its card, from values by timm's metric names such as 'top1'."""
    results = []
    for name, value in metrics.items():
        metric_type, displayed, divisor = _METRICS.get(name, (printable(name), printable(name), 1))
        results.append(EvalResult(
            task_type=_TASK, task_name='Image Classification', dataset_type=dataset_type, dataset_split=split,
            dataset_name=printable(dataset_name).strip() or dataset_type, metric_type=metric_type,
            metric_name=displayed, metric_value=round(value / divisor, 6)))
    return results


def check_fields(fields: Any) -> None:
    """Check the `card:` section of a recipe.

    Raises:
        ValueError: if a field is unknown, has the wrong type, or is not one line of printable characters. Only the
            description can have several lines.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f'card must contain "name: value" lines, got {fields!r}.')
    for name, value in fields.items():
        if name not in CARD_FIELDS:
            raise ValueError(f'card has no field {name!r}. Choose from {", ".join(CARD_FIELDS)}.')
        expected = CARD_FIELDS[name]
        texts = value if isinstance(value, list) else [value]
        if not isinstance(value, expected) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'card: {name} must be {"a list of strings" if expected is list else "a string"}, '
                             f'got {value!r}.')
        if name != 'description' and any(text != printable(text).strip() for text in texts):
            raise ValueError(f'card: {name} must be one line of printable characters, got {value!r}.')


def is_ours(card: str) -> bool:
    """Return whether a card can be replaced: it is missing, was written by this module, or contains only metadata."""
    return _MARK in card or not re.sub(r'\A---\n.*?\n---', '', card.strip(), flags=re.DOTALL).strip()


def _escape(value: str) -> str:
    """Escape external text, such as a class name, so that Markdown and HTML display it literally."""
    text = _SPECIAL.sub(r'\\\g<0>', printable(value)).translate(_ENTITIES)
    return _ADDRESS.sub(r'\g<0>&#8203;', text)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _usage(repo_id: str, revision: str | None) -> str:
    branch = f'@{revision}' if revision else ''
    option = f", revision='{revision}'" if revision else ''
    return f"""\
## Usage

Load the model with [timm](https://github.com/huggingface/pytorch-image-models):

```python
import timm

model = timm.create_model('hf-hub:{repo_id}{branch}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
probabilities = model(transform(image).unsqueeze(0)).softmax(-1)  # image: a PIL image
```

Or with [transformers](https://github.com/huggingface/transformers):

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained('{repo_id}'{option})
model = AutoModelForImageClassification.from_pretrained('{repo_id}'{option})
probabilities = model(**processor(image, return_tensors='pt')).logits.softmax(-1)
```"""


def _evaluation(results: Sequence[EvalResult]) -> str:
    rows = []
    for result in results:
        value = result.metric_value
        is_share = result.metric_type in ('accuracy', 'mean_average_precision')
        rows.append((_escape(result.metric_name), f'{100 * value:.2f} %' if is_share else f'{value:.4g}'))
    title = f'## Results\n\nEvaluated on {_escape(results[0].dataset_name)}, split `{results[0].dataset_split}`:'
    return f'{title}\n\n{_table(("metric", "value"), rows)}'


def _model_table(config: Mapping[str, Any]) -> str:
    rows = {
        'architecture': f'`{config["architecture"]}`',
        'classes': str(config['num_classes']),
        'input': ' x '.join(map(str, config['pretrained_cfg']['input_size'])),
    }
    names = config.get('label_names')
    if names and len(names) <= 30:
        rows['class names'] = ', '.join(map(_escape, names))
    return '## Model\n\n' + _table(('', ''), rows.items())


def _yaml(options: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(options), default_flow_style=None, sort_keys=True, width=100).strip()
    return f'```yaml\n{text}\n```'


def _recipe(recipe: Recipe) -> str:
    left_out = ', '.join(recipe.left_out)
    note = f' Options with values that can be private are omitted: {left_out}.' if left_out else ''
    usage = ('To repeat the training, save these options as `recipe.yaml` and run '
             f'`timm-multimix train --config recipe.yaml`. Add `--data-dir` for an image folder.{note}')
    parts = [f'{when}, the run used these options instead:\n\n{_yaml(options)}'
             for when, options in recipe.earlier.items()]
    return '\n\n'.join(['## Recipe', usage, _yaml(recipe.options), *parts])


def model_card(
        repo_id: str,
        config: Mapping[str, Any],
        *,
        revision: str | None = None,
        summary: str = '',
        results: Sequence[EvalResult] = (),
        recipe: Recipe | None = None,
        has_curve: bool = False,
        fields: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Create a model card from the content of config.json, the result of eval_results and fields as in CARD_FIELDS.

    Raises:
        ValueError: if a field is unknown or invalid.
    """
    fields = dict(fields or {})
    check_fields(fields)
    name, has_multimix = repo_id.rpartition('/')[2], recipe is not None and recipe.has_multimix
    description, _ = fields.pop('description', ''), fields.pop('dataset_name', None)
    tags = ['timm', _TASK, *(['multimix'] if has_multimix else []), *fields.pop('tags', [])]
    metadata = ModelCardData(
        library_name='timm', pipeline_tag=_TASK, tags=tags, model_name=name if results else None,
        metrics=['accuracy'] if any(result.metric_type == 'accuracy' for result in results) else None,
        eval_results=list(results) or None, **fields)
    parts = [
        f'{_MARK} Remove this line to prevent later pushes from replacing the card. -->',
        f'# {_escape(name)}',
        description,
        summary,
        _usage(repo_id, revision),
        _evaluation(results) if results else '',
        f'![Loss and accuracy over the epochs]({CURVE_NAME})' if has_curve else '',
        _model_table(config),
        _recipe(recipe) if recipe else '',
        f'Exported with timm-multimix {__version__}, timm {timm.__version__} and torch {torch.__version__}.',
        f'## Citation\n\n{_CITATION}' if has_multimix else '',
    ]
    text = '\n\n'.join(part.strip() for part in parts if part.strip())
    return ModelCard(f'---\n{metadata.to_yaml()}\n---\n\n{text}\n')
