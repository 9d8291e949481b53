"""Commands for log lines: continue a run, and validate or export its best weights."""
import argparse
import os
import shlex

from ..build.checkpoint import read_checkpoint
from ..build.option import option_name
from ..build.saved_weights import described, saved_weights, weights_entry
from ..common.command_line import program
from .config import DATA_OPTIONS, dataset_danger


def train_command(args: argparse.Namespace, folder: str, *options: str) -> str:
    """Return the command that runs the script again with the options of a run and additional ones."""
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', args.world_size)) if args.distributed else 1
    code = ['--dataset-trust-remote-code'] if args.dataset_trust_remote_code else []  # never from a config file
    code += ['--device-modules', *args.device_modules] if args.device_modules else []
    if dataset_danger(args):
        code += [part for name in DATA_OPTIONS if (value := getattr(args, name))
                 for part in (option_name(name), value) if name != 'data']
    words = ['--config', os.path.join(folder, 'args.yaml'), *options, *code]
    return f'{program("train", processes)} {shlex.join(words)}'


def export_hint(folder: str, path: str) -> str:
    """Return the weight set of a checkpoint's metric and its export command; '' if there is only one weight set."""
    checkpoint = read_checkpoint(path, verify=False)
    if 'metrics' not in checkpoint or len(set(saved_weights(checkpoint).values())) == 1:
        return ''
    entry = weights_entry(checkpoint)
    command = f'{program("hub")} export {shlex.join([folder, os.path.join(folder, "model")])}'
    return f'\nMeasured with {described(checkpoint, entry)} ({entry}). Export these weights for timm with\n  {command}'
