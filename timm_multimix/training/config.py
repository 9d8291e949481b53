"""Combine the command line and a YAML file into the arguments of a run."""
import argparse
import logging
from collections.abc import Sequence
from typing import Any

import torch
import yaml

from ..build.option import option_name
from ..build.parser import TrainingParser
from ..build.saved_weights import split_metric
from ..common.errors import UsageError, near_names, usage_errors
from ..common.recipes import find_recipe
from ..common.secrets import contains_token
from ..data.dataset_types import code_danger
from ..data.demo import DEMOS
from ..hub.card import check_fields
from ..losses.module import PRESETS
from ..options import build_training_parser, preset_options
from .checks import check_args

_logger = logging.getLogger(__name__)

_MISSPELT_CUTOFF = 0.8  # minimum similarity between an unknown key and an option to report a misspelling
# Options that let other code run. A file may come from an untrusted source, so they must be on the command line.
COMMAND_LINE_ONLY = ('dataset_trust_remote_code', 'device_modules')
# Options that select a dataset, which can run code.
DATA_OPTIONS = ('dataset', 'data', 'data_dir', 'train_split', 'val_split', 'calibrate')


def read_config(path: str, parser: TrainingParser) -> dict[str, Any]:
    """Read the options in a YAML file, by destination name.

    Keys are the names of options, with underscores or dashes. An empty value selects the default. Unknown keys are
    skipped with a warning, so that other scripts can use the same file. An unknown key that is similar to an option is
    an error, and so is an option that lets other code run. `card` contains additional fields of the model card.
    """
    with usage_errors(f'--config {path}'), open(path, encoding='utf-8') as file:
        try:
            config = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise UsageError(f'--config {path} is not valid YAML: {error}') from error
    if not isinstance(config, dict):
        raise UsageError(f'--config {path} must contain options as "name: value" lines.')
    values, card = {}, {}
    for key, value in config.items():
        name = str(key).replace('-', '_')
        if name == 'card':
            with usage_errors(f'--config {path}'):
                check_fields(value or {})
            card = {'card': value or {}}
        elif name not in parser.options:
            if misspelt := near_names(name, parser.options, cutoff=_MISSPELT_CUTOFF):
                raise UsageError(f'--config {path}: unknown option {key}.{misspelt}')
            _logger.warning(f'--config {path}: unknown option {key} is skipped.{near_names(name, parser.options)}')
        elif name in COMMAND_LINE_ONLY and value:
            raise UsageError(
                f'--config {path}: {key} lets other code run and is not allowed in a file. Remove it and, if you '
                f'trust the code, give {option_name(name)} on the command line.')
        else:
            values[name] = value
    try:
        return {**parser.parse_values(values), **card}
    except UsageError as error:
        raise UsageError(f'--config {path}: {error}') from error


def recipe_text(values: dict[str, Any]) -> str:
    """Return the options that differ from their defaults as YAML for --config."""
    defaults = {'card': {}, **vars(build_training_parser().parse_args([]))}
    return yaml.safe_dump({name: value for name, value in values.items() if value != defaults[name]})


def dataset_danger(args: argparse.Namespace) -> str:
    """Describe how opening the dataset of a run can run code. Returns '' if it cannot."""
    splits = [split for split in (args.train_split, args.val_split, args.calibrate) if split]
    return code_danger(args.dataset, args.data_dir, splits, args.dataset_trust_remote_code)


def _check_dataset_source(args: argparse.Namespace, config: str, values: dict, defaults: dict) -> None:
    """Refuse a dataset that can run code if a config file contributes to its selection."""
    danger = dataset_danger(args)
    chosen = [name for name in DATA_OPTIONS if values.get(name) and values[name] != defaults[name]]
    if danger and chosen:
        options = ', '.join(map(option_name, chosen))
        raise UsageError(
            f'--config {config}: the dataset {args.dataset} is not opened: it can run code ({danger}), and the file '
            f'sets {options}. If you trust it, give {options} on the command line.')


def _split_eval_metric(values: dict[str, Any]) -> None:
    """Replace the alias --eval-metric teacher_top1 by --eval-metric top1 --eval-weights teacher."""
    metric = values.get('eval_metric', '')
    weights, name = split_metric(metric)
    if weights is not None:
        if values.setdefault('eval_weights', weights) != weights:
            raise UsageError(f'--eval-metric {metric} contradicts --eval-weights {values["eval_weights"]}.')
        values['eval_metric'] = name


def _demo_defaults(values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the defaults of an embedded dataset and a log line. The dataset is demo/digits if none is given."""
    empty = [name for name in ('data_dir', 'dataset') if values.get(name) == '']
    named = values.get('data_dir') or values.get('dataset')
    if empty and not named:
        raise UsageError(f'{option_name(empty[0])} is empty. Leave it out to train on the embedded digits.')
    dataset = values.get('dataset') or ('' if named else 'demo/digits')
    demo = DEMOS.get(dataset.lower())
    if demo is None:
        return {}, ''
    unset = {name: value for name, value in demo.defaults().items() if name not in values}
    if 'input_size' in values:
        unset.pop('img_size', None)
    if 'lr_base' in values:
        unset.pop('lr', None)
    shown = ' '.join(f'{name}={value}' for name, value in unset.items())
    note = (
        f'{"Training" if named else "No --data-dir and no --dataset: training"} on {dataset}, {demo.name}, {demo.size}'
        f'{", with these default options: " if shown else ""}{shown}')
    return dict(unset, dataset=dataset), note


def _without_preset(values: dict[str, Any], preset: str) -> dict[str, Any]:
    """Drop the file values that a preset on the command line overrides. args.yaml of a run contains such values."""
    before = values.get('multimix_preset')
    names = {*preset_options(preset), *(preset_options(before) if before in PRESETS else ())}
    return {name: value for name, value in values.items() if name not in names}


def _resolve_defaults(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Set the defaults that depend on other options, unless the user gave a value."""
    def unless_given(name: str, value: Any) -> None:
        if name not in values:
            setattr(args, name, value)

    if args.task == 'multilabel':
        unless_given('smoothing', 0.0)
        unless_given('eval_metric', 'map')
    if args.sched in ('wsd', 'rsqrt'):
        unless_given('decay_epochs', None)  # timm's default for these schedules
    if not args.val_split:
        unless_given('eval_metric', 'loss')
    if args.log_wandb:
        args.report_to = list(dict.fromkeys([*args.report_to, 'wandb']))
    for flag, loss in (('jsd_loss', 'jsd'), ('bce_loss', 'bce')):
        if getattr(args, flag):
            if args.loss not in (None, loss):
                raise UsageError(f'{option_name(flag)} contradicts --loss {args.loss}.')
            args.loss = loss
    if args.bce_pos_weight is not None:
        if args.loss_pos_weight not in (None, str(args.bce_pos_weight)):
            raise UsageError('--bce-pos-weight and --loss-pos-weight are the same option: give only one of them.')
        args.loss_pos_weight = str(args.bce_pos_weight)


def falls_back_to_cpu(args: argparse.Namespace) -> bool:
    """Return whether a run on CUDA, the default device, uses the CPU because CUDA is not available."""
    return args.device.startswith('cuda') and not args.device_modules and not torch.cuda.is_available()


def _check_no_token(values: dict[str, Any]) -> None:
    """Refuse access tokens in options, because args.yaml, checkpoints and the shell history would store them."""
    for name, value in values.items():
        if contains_token(str(value)):
            raise UsageError(
                f'{option_name(name)} contains an access token, which would be stored with the run. Remove '
                'it, and use `hf auth login` or set HF_TOKEN.')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line and its YAML file. The command line takes precedence.

    Raises:
        UsageError: if an option, a value or a combination of options is invalid.
    """
    parser = build_training_parser()
    given = parser.parse_given(argv)
    config = given.pop('config', None)
    if config == '':
        raise UsageError('--config is empty. Leave it out, or give a file or the name of a recipe.')
    with usage_errors(f'--config {config}'):
        config = find_recipe(config) if config else ''
    file_values = read_config(config, parser) if config else {}
    if 'multimix_preset' in given:
        file_values = _without_preset(file_values, given['multimix_preset'])
    for source in (file_values, given):
        _split_eval_metric(source)
    values = {**file_values, **given}
    _check_no_token(values)
    if values.get('data'):
        values.setdefault('data_dir', values['data'])
    defaults = {name: parser.get_default(name) for name in parser.options}
    demo, demo_note = _demo_defaults(values)
    has_multimix = values.get('multimix', 'off') != 'off'
    preset = preset_options(values.get('multimix_preset', 'default')) if has_multimix else {}
    args = argparse.Namespace(**{**defaults, 'card': {}, **demo, **preset, **values})
    _resolve_defaults(args, values)
    _check_dataset_source(
        args, config, {name: value for name, value in file_values.items() if name not in given}, defaults)
    if 'device' in given and falls_back_to_cpu(args):
        raise UsageError(f'--device {args.device}: no CUDA device is available. Try --device cpu.')
    check_args(args)
    if demo_note:
        _logger.info(demo_note)
    return args
