"""Export a run folder to the format of the Hugging Face Hub: weights, config.json and model card."""
import argparse
import getpass
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from timm.models import clean_state_dict, get_pretrained_cfg, parse_model_name
from timm.utils import unwrap_model
from torch import nn

from ..build.checkpoint import read_checkpoint
from ..build.model import create_run_model, model_options, resolve_data
from ..build.recorded import check_recorded
from ..build.saved_weights import arguments_of, described, metrics_of, saved_weights, split_metric, weights_entry
from ..common.errors import UsageError, usage_errors
from ..common.files import replacing
from ..data.class_names import ordered_names
from ..data.demo import DEMOS
from ..options import build_training_parser, multimix_option_names
from . import (
    CARD_NAME,
    CONFIG_NAME,
    CURVE_NAME,
    WEIGHTS_NAME,
    Evaluation,
    HubError,
    code,
    contains_token,
    dataset_type,
    model_card,
    redact,
    save_config,
    save_weights,
)
from .summary import draw_curve, read_summary

_logger = logging.getLogger(__name__)

_BEST = ('model_calibrated.pth.tar', 'model_best.pth.tar', 'last.pth.tar')

# Options that depend on the machine, or control output and uploads. A recipe does not contain them.
_LOCAL_OPTIONS = frozenset((
    'config', 'timm_script', 'data', 'data_dir', 'class_map', 'output', 'experiment', 'resume', 'no_resume_opt',
    'start_epoch', 'stop_epoch', 'validate', 'local_rank', 'device', 'device_modules', 'report_to', 'log_wandb',
    'wandb_project', 'wandb_tags', 'wandb_resume_id', 'save_images', 'log_interval', 'recovery_interval',
    'checkpoint_hist', 'save_epochs', 'pretrained_path', 'push_to_hub', 'hub_model_id', 'hub_strategy',
    'hub_private_repo', 'hub_revision', 'hub_always_push', 'hub_weights', 'hub_force', 'card'))

_REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+')


def write_config(
        folder: str,
        args: argparse.Namespace,
        model: nn.Module,
        data_config: Mapping[str, Any],
        class_to_idx: Mapping[str, int] | None,
) -> None:
    """Write timm's config.json of the model to the run folder.

    Args:
        folder: Run folder.
        args: Arguments of the run.
        model: The model.
        data_config: Input size, pixel statistics, crop and interpolation.
        class_to_idx: Index of each class name, None if the class names are unknown.

    Raises:
        UsageError: if timm cannot write the configuration and --push-to-hub is set.
    """
    try:
        with replacing(os.path.join(folder, CONFIG_NAME)) as path:
            save_config(
                unwrap_model(model), path,
                data_config=dict(data_config, crop_mode='center'),  # as in timm's validation
                label_names=ordered_names(class_to_idx, args.num_classes),
                from_scratch=not (args.pretrained or args.initial_checkpoint))
    except HubError as error:
        if args.push_to_hub:
            raise UsageError(f'--push-to-hub: {error}') from error
        _logger.warning(f'{CONFIG_NAME} was not written. This run cannot be exported or pushed: {error}')


class Model(NamedTuple):
    """An exported model of a run.

    Attributes:
        architecture: timm's name of the model.
        message: Commit message.
        origin: Description of the weights and their checkpoint.
    """
    architecture: str
    message: str
    origin: str


def plain_weights(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the plain timm model, without wrapper prefixes and the auxiliary BatchNorms of --split-bn."""
    return {name: value for name, value in clean_state_dict(state_dict).items() if 'aux_bn' not in name}


def _find_weights(paths: Sequence[str], weights: str) -> tuple[str, dict[str, Any], str]:
    """Find the first checkpoint that contains a set of weights.

    Args:
        paths: Checkpoints.
        weights: 'best' (the weights that the checkpoint's metric belongs to), 'student', 'ema' or 'teacher'.

    Returns:
        Path of the checkpoint, its content, and the entry with the weights.

    Raises:
        UsageError: if no checkpoint contains the weights.
    """
    available: set[str] = set()
    for path in paths:
        checkpoint = read_checkpoint(path)
        entry = weights_entry(checkpoint, weights)
        if entry is not None:
            return path, checkpoint, entry
        available |= saved_weights(checkpoint).keys()
    raise UsageError(
        f'{paths[-1]} does not contain the {weights} weights. Choose from {", ".join(["best", *sorted(available)])}.')


def _is_private(value: Any) -> bool:
    """Return whether the value of an option can reveal private data, such as a path, a host name or a token."""
    if isinstance(value, Mapping):
        return any(map(_is_private, value.values())) or any(map(_is_private, value))
    if isinstance(value, (list, tuple)):
        return any(map(_is_private, value))
    if not isinstance(value, str):
        return False
    if value.startswith('hf-hub:'):
        return False
    if redact(value) != value:
        return True
    names = {socket.gethostname(), socket.gethostname().partition('.')[0], os.environ.get('WANDB_API_KEY', '')}
    with suppress(OSError, KeyError, ImportError):
        names.add(getpass.getuser())
    looks_local = re.search(r'(^|[\s=:,])(/|~|\.\.?/|[A-Za-z]:[\\/]|\\\\)|\\|://|\b[0-9a-f]{40}\b', value)
    return bool(looks_local) or any(
        re.search(rf'(?<![\w-]){re.escape(name)}(?![\w-])', value) for name in names if len(name) > 2)


def _public(value: str | None, otherwise: str) -> str:
    return otherwise if not value or _is_private(value) else value


def recipe(args: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Select the options that repeat a training run, without private values.

    Returns:
        Options that differ from their defaults, and the names of options that are omitted as private.
    """
    defaults = vars(build_training_parser().parse_args([]))
    given = {name: value for name, value in args.items()
             if name in defaults and value != defaults[name] and name not in _LOCAL_OPTIONS}
    private = sorted(name for name, value in given.items() if _is_private(value))
    return {name: value for name, value in given.items() if name not in private}, private


def _base_model(args: Mapping[str, Any]) -> str | None:
    """Repository on the Hub of the pretrained weights that a run started from; None if there is none."""
    source, name = parse_model_name(args['model'])
    start_source, start = _split(args.get('initial_checkpoint') or '')
    if start_source == 'hf-hub':
        base = start.partition('@')[0]
    elif not args.get('pretrained') or args.get('pretrained_path') or start:
        return None
    elif source == 'hf-hub':
        base = name.partition('@')[0]
    else:
        cfg = get_pretrained_cfg(name, allow_unregistered=True) if source is None else None
        base = cfg.hf_hub_id if cfg is not None else None
    return base if base and _REPOSITORY.fullmatch(base) else None


def _split(name: str) -> tuple[str | None, str]:
    source, separator, rest = name.partition(':')
    return ('hf-hub', rest) if separator and source.lower() in ('hf-hub', 'hf_hub') else (None, name)


def _metrics(
        args: Mapping[str, Any],
        checkpoint: Mapping[str, Any],
        entry: str,
        row: Mapping[str, float],
) -> dict[str, float]:
    """Metrics of the weights in an entry. The matching summary row completes those of timm's own checkpoints."""
    if not args.get('val_split'):
        return {}
    prefix, metrics = 'eval_', metrics_of(checkpoint, entry, args.get('eval_metric', ''))
    is_row = all(abs(row.get(prefix + name, float('inf')) - value) <= 1e-6 * max(1, abs(value))
                 for name, value in metrics.items())
    if 'metrics' not in checkpoint and metrics and is_row:
        names = (key.removeprefix(prefix) for key in row if key.startswith(prefix))
        metrics = {name: row[prefix + name] for name in names if split_metric(name)[0] is None}
        if 'temperature' in checkpoint:
            metrics.pop('loss', None)
    return metrics


def _evaluation(args: Mapping[str, Any], metrics: dict[str, float]) -> Evaluation | None:
    if not metrics:
        return None
    dataset, split = _public(args.get('dataset'), ''), _public(args['val_split'], 'validation')
    demo = DEMOS.get(dataset.lower())
    fields = args.get('card') or {}
    kind = dataset_type(dataset)
    name = demo.name if demo else 'images in folders' if kind == 'imagefolder' else kind
    return Evaluation((fields.get('datasets') or [kind])[0], fields.get('dataset_name') or name, split, metrics)


def _earlier(args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of the earlier parts of a run that was resumed with other options. Keys such as 'Before epoch 3'."""
    options: dict[str, Any] = {}
    parts = []
    for part in reversed(args.get('earlier') or ()):
        options = {**options, **part['options']}
        when = f'{"Until partway through" if part["in_epoch"] else "Before"} epoch {int(part["epoch"])}'
        parts.append((when, {name: value for name, value in options.items()
                             if not _is_private(value) and value != args.get(name)}))
    return dict(reversed(parts))


def _method(args: Mapping[str, Any]) -> str:
    mode = args.get('multimix')
    return f' with {mode} [MultiMix](https://arxiv.org/abs/2311.05538)' if mode in ('pooled', 'dense') else ''


def _summary(
        args: Mapping[str, Any],
        config: Mapping[str, Any],
        checkpoint: Mapping[str, Any],
        entry: str,
        base: str | None,
        earlier: Mapping[str, Mapping[str, Any]],
) -> str:
    """Describe the model and its training in a few sentences."""
    epoch, temperature = checkpoint.get('epoch'), checkpoint.get('temperature')
    methods = {when: _method(options) or ' without MultiMix' for when, options in earlier.items()
               if 'multimix' in options}
    verb = f'fine-tuned from [{base}](https://huggingface.co/{base})' if base else 'trained'
    sentences = [
        f'This image classifier has {config["num_classes"]} classes and the architecture '
        f'{code(config["architecture"])}.',
        f'It was {verb}{_method(args) or (" without MultiMix" if methods else "")}.',
        *(f'{when}, it was trained{method} instead.' for when, method in methods.items()),
        f'{code(WEIGHTS_NAME)} contains {described(checkpoint, entry)}'
        f'{"" if epoch is None else f" after epoch {epoch} (counted from 0)"}.',
    ]
    if temperature is not None:
        sentences.append(
            f'The model is calibrated: a temperature of {temperature:.4g} is folded into its classifier.')
    return ' '.join(sentences)


def _multimix(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if args.get('multimix', 'off') == 'off':
        return None
    names = multimix_option_names()
    return {name: value for name, value in args.items()
            if name in names and value is not None and not _is_private(value)}


def _check_public(text: str, folder: str) -> None:
    """Check that a text contains no access token and no path of this machine.

    Raises:
        HubError: if it contains one.
    """
    api_key = os.environ.get('WANDB_API_KEY')
    paths = (os.path.realpath(folder), os.path.expanduser('~'))
    if contains_token(text) or (api_key and api_key in text) or any(
            len(path) > 1 and re.search(rf'(?<![\w.-]){re.escape(path)}', text) for path in paths):
        raise HubError(
            f'{CARD_NAME} or {CONFIG_NAME} would contain private data: an access token or a path of this machine.')


def _arguments(folder: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a run, from its checkpoint or else from args.yaml."""
    args, parser = arguments_of(checkpoint), build_training_parser()
    if not args:
        try:
            with open(os.path.join(folder, 'args.yaml'), encoding='utf-8') as file:
                args = yaml.safe_load(file)
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f'{folder} is not a run folder: it contains no readable args.yaml.') from error
    check_recorded(args, parser, f'The run in {folder}')
    return {**vars(parser.parse_args([])), 'card': {}, **args}


def _rebuild_config(args: Mapping[str, Any], path: str) -> None:
    """Write config.json for a run of timm's own script, which does not write it."""
    settings = argparse.Namespace(**{**args, 'pretrained': False, 'initial_checkpoint': '', 'pretrained_path': None})
    model = create_run_model(settings, model_options(settings))
    save_config(model, path, data_config=dict(resolve_data(settings, model), crop_mode='center'),
                from_scratch=not (args['pretrained'] or args['initial_checkpoint']))


def _write_config(folder: str, args: Mapping[str, Any], path: str) -> dict[str, Any]:
    source = os.path.join(folder, CONFIG_NAME)
    if os.path.isfile(source) and not os.path.islink(source):  # a link could point to any file of the user
        shutil.copyfile(source, path)
    else:
        _rebuild_config(args, path)
    with open(path, encoding='utf-8') as file:
        return json.load(file)


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
    """Export the model of a run as model.safetensors, config.json, README.md and training_curve.png.

    Args:
        folder: Run folder.
        target: Empty output folder.
        repo_id: Repository in the card, 'user/name'.
        revision: Branch in the card.
        weights: 'best' (the weights that the checkpoint's metric belongs to), 'student', 'ema' or 'teacher'.
        checkpoint_path: Checkpoint to export. The default is the first one that contains the weights: the calibrated,
            the best or the last checkpoint.
        card_only: Do not write the weights.

    Raises:
        UsageError: if the folder contains no run with these weights, or if a card field is invalid.
        HubError: if timm cannot write the configuration of the model, or if the files would contain private data.
    """
    paths = [checkpoint_path] if checkpoint_path else [os.path.join(folder, name) for name in _BEST]
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        raise UsageError(f'{folder} contains no checkpoint of a run. It has none of the files {", ".join(_BEST)}.')
    path, checkpoint, key = _find_weights(paths, weights)
    args = _arguments(folder, checkpoint)
    config = _write_config(folder, args, os.path.join(target, CONFIG_NAME))
    if not card_only:
        save_weights(plain_weights(checkpoint[key]), os.path.join(target, WEIGHTS_NAME))
    epoch = checkpoint.get('epoch')
    rows = read_summary(folder)
    has_curve = draw_curve(rows, os.path.join(target, CURVE_NAME))
    base = _base_model(args)
    options, left_out = recipe(args)
    if 'model' in left_out:
        options['model'] = config['architecture']
    metrics = _metrics(args, checkpoint, key, next((row for row in rows if row['epoch'] == epoch), {}))
    with usage_errors('The model card'):
        earlier = _earlier(args)
        card = str(model_card(
            repo_id, config, revision=revision, summary=_summary(args, config, checkpoint, key, base, earlier),
            evaluation=_evaluation(args, metrics), multimix=_multimix(args), recipe=options, left_out=left_out,
            earlier=earlier, has_curve=has_curve,
            fields={**_dataset_fields(args), **({'base_model': base} if base else {}), **(args['card'] or {})}))
    _check_public(card + json.dumps(config, ensure_ascii=False), folder)
    Path(target, CARD_NAME).write_text(card, encoding='utf-8')
    name = split_metric(args.get('eval_metric', ''))[1]
    metric = f', {name} {metrics[name]:.4g}' if name in metrics else ''
    return Model(
        config['architecture'], f'{config["architecture"]}, epoch {epoch}{metric}',
        f'{described(checkpoint, key)}{", calibrated" if "temperature" in checkpoint else ""}, from {path}')


def _dataset_fields(args: Mapping[str, Any]) -> dict[str, Any]:
    dataset = _public(args.get('dataset'), '')
    return {'datasets': [dataset_type(dataset)]} if dataset.lower().startswith(('hfds/', 'hfids/')) else {}
