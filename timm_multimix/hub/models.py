"""Save and push timm models in the format of the Hub: model.safetensors and timm's config.json."""
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors.torch import save
from timm.models import create_model
from timm.utils import unwrap_model
from torch import nn

from ..build.hub_files import CONFIG_NAME, WEIGHTS_NAME, HubError
from ..common.library_internals import save_config_for_hf
from .card import CARD_NAME, model_card
from .repository import HubRepository

# Fields of a pretrained_cfg that describe the pretrained weights.
_PRETRAINED_FIELDS = ('tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


def save_weights(state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Save weights as safetensors. The tensors may share memory and have any memory format."""
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, value in state_dict.items()}
    # save_file would create a file that only the owner can read
    Path(path).write_bytes(save(tensors, metadata={'format': 'pt'}))


def save_config(
        model: nn.Module,
        path: str | os.PathLike,
        *,
        data_config: Mapping[str, Any] | None = None,
        label_names: Sequence[str] | None = None,
        model_args: Mapping[str, Any] | None = None,
        from_scratch: bool = False,
) -> None:
    """Save timm's config.json, from which create_model rebuilds the model. See push_to_hub for the arguments.

    With `from_scratch`, it omits the fields that describe timm's pretrained weights, such as their license.

    Raises:
        HubError: if timm cannot write the configuration of the model.
    """
    try:
        save_config_for_hf(
            model, path, model_config=dict(label_names=list(label_names)) if label_names else None,
            model_args=model_args, data_config=data_config)
    except (ValueError, TypeError, AttributeError) as error:
        raise HubError(f'timm cannot write the configuration of this model: {error}') from error
    config = json.loads(Path(path).read_text())
    # Also stored at the top level. transformers passes that value and rejects a second one.
    config.get('model_args', {}).pop('num_classes', None)
    if from_scratch:
        config['pretrained_cfg'] = {
            name: value for name, value in config['pretrained_cfg'].items() if name not in _PRETRAINED_FIELDS}
    Path(path).write_text(json.dumps(config, indent=2))


def check_rebuilds(folder: str | os.PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Check that timm rebuilds the model with these weights from the config.json in a folder.

    Raises:
        HubError: if timm cannot build a model, or if the names or shapes of its weights differ.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # preserves the random state of a training run
            model = create_model(f'local-dir:{Path(folder).absolute()}', pretrained=False)
        model.load_state_dict(state_dict)
    except Exception as error:  # constructors of models raise exceptions of many types
        raise HubError(
            'timm cannot rebuild this model from its configuration. Configure all changes with arguments of '
            f'create_model. {error}') from error


def push_to_hub(
        model: nn.Module,
        repo_id: str,
        *,
        commit_message: str = 'Add model',
        revision: str | None = None,
        private: bool | None = None,
        force: bool = False,
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        model_args: Mapping[str, Any] | None = None,
        card: str | None = None,
        card_fields: Mapping[str, Any] | None = None,
) -> str:
    """Push a timm model to the Hub. `timm.create_model('hf-hub:user/name', pretrained=True)` then loads it.

    Args:
        model: A timm model, trained with any package. It can be wrapped by DDP or torch.compile, or attached.
        repo_id: 'user/name', or 'name' for your own namespace. The repository is created if it does not exist.
        commit_message: Commit message.
        revision: Branch to push to. It is created if it does not exist. None for main.
        private: Whether a new repository is private; None for the default of the namespace.
        force: Overwrite another architecture.
        label_names: Class names, in the order of the classes.
        data_config: Input size, pixel statistics, interpolation and crop, in the format of timm's resolve_data_config.
            The default is the configuration of the model.
        model_args: Arguments of create_model that timm has not recorded.
        card: Text of README.md with metadata. The default is a short card with an example that loads the model.
        card_fields: Fields of the default card, such as license, datasets, base_model and tags.

    Returns:
        URL of the commit.

    Raises:
        HubError: if there is no token with write access, the name is invalid or belongs to another user, timm cannot
            rebuild the model, the repository contains another architecture, or the Hub cannot be reached.
        ValueError: if a card field or the metadata of the card is invalid.

    Examples:

        ```python
        push_to_hub(model, 'user/resnet18-digits', label_names=[str(digit) for digit in range(10)])
        ```
    """
    model = unwrap_model(model)
    state_dict = model.state_dict()
    repository = HubRepository(repo_id, revision=revision, private=private, force=force)
    with TemporaryDirectory(prefix='timm-multimix-') as folder:
        save_config(model, Path(folder) / CONFIG_NAME, data_config=data_config, label_names=label_names,
                    model_args=model_args)
        check_rebuilds(folder, state_dict)
        config = json.loads((Path(folder) / CONFIG_NAME).read_text())
        repository.log_in()
        if card is None:
            card = str(model_card(repository.repo_id, config, revision=revision, fields=card_fields))
        ModelCard(card)  # raises a ValueError for invalid metadata
        (Path(folder) / CARD_NAME).write_text(card, encoding='utf-8')
        save_weights(state_dict, Path(folder) / WEIGHTS_NAME)
        repository.open(config['architecture'])
        return repository.push(folder, commit_message)
