"""Push trained models to the Hugging Face Hub in the format that timm loads.

In Python, call `push_to_hub(model, 'user/name')`. For a run folder, use the command line:

    timm-multimix hub push RUN_FOLDER user/name
    timm-multimix hub card RUN_FOLDER

The access token comes from `hf auth login` or HF_TOKEN. It is never an argument.
"""
from ..build.hub_files import HubError
from .models import push_to_hub

__all__ = ['HubError', 'push_to_hub']
