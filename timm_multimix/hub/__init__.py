"""Push trained models to the Hugging Face Hub in the format that timm loads.

In Python, call `push_to_hub(model, 'user/name')`. For a run folder, use the command line:

    timm-multimix hub push RUN_FOLDER user/name
    timm-multimix hub card RUN_FOLDER

The access token comes from `hf auth login` or HF_TOKEN. It is never an argument.
"""
from ..build.hub_files import CONFIG_NAME, PATIENCE, WEIGHTS_NAME, HubError, download, is_hub_name
from ..common.secrets import contains_token, redact
from .card import CARD_NAME, CURVE_NAME, Evaluation, check_fields, dataset_type, model_card
from .markdown import code
from .models import check_rebuilds, push_to_hub, save_config, save_weights
from .repository import RETRY_WAITS, HubRepository, limit_waiting, with_retries

__all__ = [
    'CARD_NAME',
    'CONFIG_NAME',
    'CURVE_NAME',
    'PATIENCE',
    'RETRY_WAITS',
    'WEIGHTS_NAME',
    'Evaluation',
    'HubError',
    'HubRepository',
    'check_fields',
    'check_rebuilds',
    'code',
    'contains_token',
    'dataset_type',
    'download',
    'is_hub_name',
    'limit_waiting',
    'model_card',
    'push_to_hub',
    'redact',
    'save_config',
    'save_weights',
    'with_retries',
]
