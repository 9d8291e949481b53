"""A timm model as the Hub has it: model.safetensors and timm's config.json."""
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from timm.models import create_model
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import nn

from .card import CARD_NAME, model_card
from .repository import CONFIG_NAME, WEIGHTS_NAME, HubError, HubRepository, with_retries

# What a pretrained_cfg says of the weights themselves.
_OF_PRETRAINED = ('tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


def save_weights(state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Write the weights of a model as safetensors, with the permissions of any new file.

    Args:
        state_dict: As timm's model has it; tensors may share memory and have any memory layout.
        path: File to write.
    """
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, value in state_dict.items()}
    Path(path).touch()
    mode = os.stat(path).st_mode
    save_file(tensors, path, metadata={'format': 'pt'})
    os.chmod(path, stat.S_IMODE(mode))  # safetensors lets nobody else read it


def save_config(
        model: nn.Module,
        path: str | os.PathLike,
        *,
        data_config: Mapping[str, Any] | None = None,
        label_names: Sequence[str] | None = None,
        model_args: Mapping[str, Any] | None = None,
        from_scratch: bool = False,
) -> None:
    """Write timm's config.json, from which create_model makes the model again.

    Args:
        model: A timm model.
        path: File to write.
        data_config: Input size, pixel statistics, interpolation and crop that the model was evaluated with, as
            timm's resolve_data_config returns them; by default the model's own.
        label_names: Names of the classes, in order.
        model_args: Arguments of create_model that timm has not recorded, or replacements for some that are not JSON.
        from_scratch: Say nothing of the pretrained weights that timm has for this architecture, such as their license.

    Raises:
        HubError: if timm cannot write the model's arguments down.
    """
    try:
        save_config_for_hf(
            model, path, model_config=dict(label_names=list(label_names)) if label_names else None,
            model_args=dict(model_args) if model_args else None, data_config=dict(data_config) if data_config else None)
    except (ValueError, TypeError, AttributeError) as error:
        raise HubError(f'timm cannot describe this model for the Hub: {error}') from error
    if from_scratch:
        config = json.loads(Path(path).read_text())
        config['pretrained_cfg'] = {
            name: value for name, value in config['pretrained_cfg'].items() if name not in _OF_PRETRAINED}
        Path(path).write_text(json.dumps(config, indent=2))


def check_rebuilds(folder: str | os.PathLike, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Check that timm makes the same model again from a folder with config.json.

    Args:
        folder: The folder.
        state_dict: The model's weights.

    Raises:
        HubError: if it does not.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # training that follows must not notice
            model = create_model(f'local-dir:{Path(folder).absolute()}', pretrained=False)
    except Exception as error:  # whatever a model's constructor raises
        raise HubError(f'timm cannot make this model again from its configuration: {error}') from error
    shapes = {name: value.shape for name, value in state_dict.items()}
    rebuilt = {name: value.shape for name, value in model.state_dict().items()}
    differing = sorted(name for name in shapes.keys() | rebuilt.keys() if shapes.get(name) != rebuilt.get(name))
    if differing:
        raise HubError(
            f'timm makes another model from the configuration of this one: {", ".join(differing[:3])} '
            f'{"differs" if len(differing) == 1 else "differ"}. Give create_model arguments for all that you changed.')


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
    """Push a timm model, so that `timm.create_model('hf-hub:user/name', pretrained=True)` gives it back.

    Args:
        model: A timm model, trained with this package or not; wrapped by DDP or torch.compile, or attached, or not.
        repo_id: 'user/name', or 'name' for a repository of your own. It is made if there is none.
        commit_message: What the commit is.
        revision: Branch to push to, made if it does not exist; None for main.
        private: Whether a repository that is made here is private; None for the namespace's default.
        force: Push over another architecture.
        label_names: Names of the classes, in order.
        data_config: Input size, pixel statistics, interpolation and crop, as timm's resolve_data_config returns them;
            by default the model's own.
        model_args: Arguments of create_model that timm has not recorded.
        card: Text of README.md, with metadata; by default a short card that says how to load the model.
        card_fields: For the default card: license, datasets, base_model, tags and such.

    Returns:
        Address of the commit.

    Raises:
        HubError: if there is no token that may write, the name is not free, the repository holds another
            architecture, or the Hub cannot be reached.
        ValueError: if a card field is unknown.

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
        ModelCard(card)  # raises a ValueError for metadata that is none
        (Path(folder) / CARD_NAME).write_text(card, encoding='utf-8')
        save_weights(state_dict, Path(folder) / WEIGHTS_NAME)
        repository.open(config['architecture'])
        return with_retries(lambda: repository.commit(folder, commit_message))
