"""Export a run folder to the format of the Hugging Face Hub: weights, config.json and model card."""
import argparse
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import get_pretrained_cfg, parse_model_name
from timm.utils import unwrap_model
from torch import nn

from ..build.checkpoint import read_checkpoint
from ..build.hub_files import CONFIG_NAME, WEIGHTS_NAME, HubError, is_hub_name
from ..build.model import create_run_model, model_options, resolve_data
from ..build.recorded import recorded_arguments
from ..build.saved_weights import (
    RUN_CHECKPOINTS,
    arguments_of,
    described,
    metrics_of,
    plain_weights,
    saved_weights,
    split_metric,
    weights_entry,
)
from ..common.errors import UsageError, usage_errors
from ..common.files import replacing
from ..common.secrets import contains_token
from ..data.class_names import ordered_names
from ..data.demo import DEMOS
from ..options import build_training_parser
from .card import CARD_NAME, CURVE_NAME, eval_results, model_card
from .models import save_config, save_weights
from .recipe import Recipe, public_text, recipe_of
from .summary import draw_curve, read_summary

_logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+')
_CROP = dict(crop_mode='center')  # as in timm's validation


def write_config(
        folder: str, args: argparse.Namespace, model: nn.Module, data_config: Mapping[str, Any],
        class_to_idx: Mapping[str, int] | None) -> None:
    """Write timm's config.json of a run's model to the run folder.

    Raises:
        UsageError: if timm cannot write the configuration and --push-to-hub is set.
    """
    try:
        with replacing(os.path.join(folder, CONFIG_NAME)) as path:
            save_config(
                unwrap_model(model), path, data_config=dict(data_config, **_CROP),
                label_names=ordered_names(class_to_idx, args.num_classes),
                from_scratch=not (args.pretrained or args.initial_checkpoint))
    except HubError as error:
        if args.push_to_hub:
            raise UsageError(f'--push-to-hub: {error}') from error
        _logger.warning(f'{CONFIG_NAME} was not written. This run cannot be exported or pushed: {error}')


class Model(NamedTuple):
    """An exported model of a run."""
    architecture: str
    message: str  # of the commit
    origin: str  # description of the weights and their checkpoint


def _find_weights(paths: Sequence[str], weights: str) -> tuple[str, dict[str, Any], str]:
    """Return the first checkpoint that contains a set of weights: its path, its content, and the entry."""
    available: set[str] = set()
    for path in paths:
        checkpoint = read_checkpoint(path)
        entry = weights_entry(checkpoint, weights)
        if entry is not None:
            return path, checkpoint, entry
        available |= saved_weights(checkpoint).keys()
    raise UsageError(
        f'{paths[-1]} does not contain the {weights} weights. Choose from {", ".join(["best", *sorted(available)])}.')


def _write_config(folder: str, args: argparse.Namespace, path: str, from_scratch: bool) -> dict[str, Any]:
    """Copy the config.json of a run and return its content. It is created for a run of timm's own script."""
    source = os.path.join(folder, CONFIG_NAME)
    if os.path.isfile(source) and not os.path.islink(source):  # a link could point to any file of the user
        shutil.copyfile(source, path)
    else:
        model = create_run_model(args, model_options(args))
        save_config(model, path, data_config=dict(resolve_data(args, model), **_CROP), from_scratch=from_scratch)
    with usage_errors(source):
        return json.loads(Path(path).read_text(encoding='utf-8'))


def _base_model(args: Mapping[str, Any]) -> str | None:
    """Return the repository of the pretrained weights that a run started from, None if there is none."""
    start = args['initial_checkpoint'] or ''
    if not is_hub_name(start) and (start or not args['pretrained'] or args['pretrained_path']):
        return None
    source, name = parse_model_name(start or args['model'])
    if source is None:
        cfg = get_pretrained_cfg(name, allow_unregistered=True)
        name = (cfg and cfg.hf_hub_id) or ''
    base = name.partition('@')[0]
    return base if source != 'local-dir' and _REPOSITORY.fullmatch(base) else None


def _dataset(args: Mapping[str, Any]) -> tuple[str, str]:
    """Return an identifier of the dataset of a run that is valid on the Hub, and its displayed name."""
    dataset = public_text(args, 'dataset', '')
    prefix, _, rest = dataset.partition('/')
    kind = 'webdataset' if prefix.lower() == 'wds' else rest.partition(':')[0] or 'imagefolder'
    demo = DEMOS.get(dataset.lower())
    return kind, demo.name if demo else 'images in folders' if kind == 'imagefolder' else kind


def _method(options: Mapping[str, Any]) -> str:
    mode = options.get('multimix')
    return f' with {mode} [MultiMix](https://arxiv.org/abs/2311.05538)' if mode in ('pooled', 'dense') else ''


def _summary(
        config: Mapping[str, Any], checkpoint: Mapping[str, Any], entry: str, base: str | None, recipe: Recipe) -> str:
    """Describe the model and its training in a few sentences."""
    epoch, temperature = checkpoint.get('epoch'), checkpoint.get('temperature')
    methods = {when: _method(options) or ' without MultiMix' for when, options in recipe.earlier.items()
               if 'multimix' in options}
    verb = f'fine-tuned from [{base}](https://huggingface.co/{base})' if base else 'trained'
    how = _method(recipe.options) or (' without MultiMix' if methods else '')
    sentences = [
        f'This image classifier has {config["num_classes"]} classes and the architecture `{config["architecture"]}`.',
        *([f'It was {verb}{how}.'] if base or how else []),
        *(f'{when}, it was trained{method} instead.' for when, method in methods.items()),
        f'`{WEIGHTS_NAME}` contains {described(checkpoint, entry)}'
        f'{"" if epoch is None else f" after epoch {epoch} (counted from 0)"}.',
    ]
    if temperature is not None:
        sentences.append(
            f'The model is calibrated: a temperature of {temperature:.4g} is folded into its classifier.')
    return ' '.join(sentences)


def export(
        folder: str,
        target: str,
        repo_id: str,
        *,
        revision: str | None = None,
        weights: str = 'best',
        checkpoint_path: str | None = None,
        card_only: bool = False,
) -> Model:
    """Export the model of a run folder as model.safetensors, config.json, README.md and training_curve.png.

    Args:
        folder: Run folder.
        target: Empty output folder.
        repo_id: Repository in the card, 'user/name', with its branch `revision`.
        weights: 'best' (the weights that the checkpoint's metric belongs to), 'student', 'ema' or 'teacher'.
        checkpoint_path: The default is the first one that contains the weights: calibrated, best or last checkpoint.
        card_only: Do not write the weights.

    Raises:
        UsageError: if the folder contains no run with these weights, or if a card field is invalid.
        HubError: if timm cannot write the configuration of the model, or if the files would contain an access token.
    """
    paths = [checkpoint_path] if checkpoint_path else [os.path.join(folder, name) for name in RUN_CHECKPOINTS]
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        raise UsageError(
            f'{folder} is not a run folder with a finished epoch: it has none of {", ".join(RUN_CHECKPOINTS)}.')
    path, checkpoint, key = _find_weights(paths, weights)
    recorded = recorded_arguments(checkpoint, path, build_training_parser())
    args = {**vars(recorded), **arguments_of(checkpoint)}
    from_scratch = not (args['pretrained'] or args['initial_checkpoint'])
    config = _write_config(folder, recorded, os.path.join(target, CONFIG_NAME), from_scratch)
    architecture, epoch = config['architecture'], checkpoint.get('epoch')
    if not card_only:
        save_weights(plain_weights(checkpoint[key]), os.path.join(target, WEIGHTS_NAME))
    base, recipe = _base_model(args), recipe_of(args, architecture)
    metrics = metrics_of(checkpoint, key, public_text(args, 'eval_metric', 'metric')) if args['val_split'] else {}
    kind, shown = _dataset(args)
    on_hub = public_text(args, 'dataset', '').lower().startswith(('hfds/', 'hfids/'))
    fields: dict[str, Any] = {'datasets': [kind]} if on_hub else {}
    fields.update({'base_model': base} if base else {}, **(args.get('card') or {}))
    results = eval_results(
        metrics, (fields.get('datasets') or [kind])[0], fields.get('dataset_name') or shown,
        public_text(args, 'val_split', 'validation'))
    with usage_errors('The model card'):
        card = str(model_card(
            repo_id, config, revision=revision, summary=_summary(config, checkpoint, key, base, recipe),
            results=results, recipe=recipe, fields=fields,
            has_curve=draw_curve(read_summary(folder), os.path.join(target, CURVE_NAME))))
    if contains_token(card + json.dumps(config, ensure_ascii=False)):
        raise HubError(f'{CARD_NAME} or {CONFIG_NAME} would contain an access token.')
    Path(target, CARD_NAME).write_text(card, encoding='utf-8')
    name = split_metric(args['eval_metric'] or '')[1]
    metric = f', {name} {metrics[name]:.4g}' if name in metrics else ''
    return Model(
        architecture, f'{architecture}, epoch {epoch}{metric}',
        f'{described(checkpoint, key)}{", calibrated" if "temperature" in checkpoint else ""}, from {path}')
