"""Output of the commands that measure models: an output folder, results.json and a table on the terminal."""
import json
import os
import sys
from datetime import datetime
from typing import Any

import timm
import torch
import torchvision

from ..version import __version__
from .errors import usage_errors
from .files import json_values, replacing

RESULTS = 'results.json'


def default_folder(command: str) -> str:
    """Output folder of a command that was started now."""
    return os.path.join('output', command, datetime.now().strftime('%Y%m%d-%H%M%S'))


def write_file(folder: str, name: str, content: str | bytes) -> str:
    """Write a file into the folder of --output, atomically. Return its path."""
    path = os.path.join(folder, name)
    with usage_errors(f'--output {folder}'):
        os.makedirs(folder, exist_ok=True)
        with replacing(path) as temporary, open(temporary, 'wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
    return path


def write_results(folder: str, **content: Any) -> None:
    """Write results.json, with the date and the versions of the packages."""
    versions = dict(
        timm_multimix=__version__, timm=timm.__version__, torch=torch.__version__, torchvision=torchvision.__version__)
    document = dict(date=datetime.now().astimezone().isoformat(timespec='seconds'), versions=versions, **content)
    write_file(folder, RESULTS, json.dumps(json_values(document), indent=2, allow_nan=False) + '\n')


def print_text(text: str) -> None:
    """Print a text to a terminal of any encoding."""
    encoding = sys.stdout.encoding or 'utf-8'
    print(text.encode(encoding, 'backslashreplace').decode(encoding))
