"""Option values that are stored in a checkpoint."""
import argparse
import os
from collections.abc import Mapping
from typing import Any

import yaml

from ..common.errors import UsageError, usage_errors
from .parser import TrainingParser
from .saved_weights import arguments_of

# Options for the initial weights of a run: the checkpoint replaces them.
_INITIAL_WEIGHTS = dict(
    pretrained=False, pretrained_path=None, initial_checkpoint='', head_init_scale=None, head_init_bias=None,
    grad_checkpointing=False, torchscript=False)


def recorded_arguments(checkpoint: Mapping[str, Any], path: str, parser: TrainingParser) -> argparse.Namespace:
    """Return the arguments of the run that wrote a checkpoint, without its options for initial weights.

    If the checkpoint contains no arguments, they are read from args.yaml in its folder.

    Raises:
        UsageError: if there are no arguments, or an argument has an invalid value.
    """
    values = arguments_of(checkpoint)
    beside = os.path.join(os.path.dirname(path), 'args.yaml')
    if not values and os.path.isfile(beside):
        with usage_errors(beside), open(beside, encoding='utf-8') as file:
            values = yaml.safe_load(file)
    if not isinstance(values, dict) or not values.get('model'):
        raise UsageError(
            f'{path} does not name its model: neither the file nor an args.yaml in its folder contains arguments. Give '
            'the run folder, or the name of a model of timm or the Hub.')
    try:
        parser.parse_values(values)
    except UsageError as error:
        raise UsageError(f'{path} contains invalid arguments: {error}') from error
    return argparse.Namespace(**{**vars(parser.parse_args([])), **values, **_INITIAL_WEIGHTS})
