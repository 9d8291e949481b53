"""The command `timm-multimix hub`: push, export or describe the model of a run folder."""
import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from safetensors.torch import load_file

from ..build.hub_files import WEIGHTS_NAME
from ..build.saved_weights import WEIGHTS
from ..common.command_line import Parser, check_packages, exit_status, program
from ..common.errors import UsageError, usage_errors
from .card import CARD_NAME
from .export import export
from .models import check_rebuilds
from .onnx import write_onnx
from .repository import HubRepository, limit_waiting

_logger = logging.getLogger(__name__)


def push_command(folder: str, repository: HubRepository, weights: str) -> str:
    """Return the command that pushes a run folder to a repository."""
    options = ['--revision', repository.revision] if repository.revision else []
    options += ['--private'] if repository.private else []
    options += ['--weights', weights] if weights != 'best' else []
    return f'{program("hub")} push {shlex.join([folder, repository.repo_id, *options])}'


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program('hub'),
        description='Push the model of a run to the Hugging Face Hub, export it to a folder in the same format, or '
                    'print its model card. Only push needs an access token, from `hf auth login` or HF_TOKEN.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='{push,export,card}')
    push = commands.add_parser('push', help='push the model of a run, or repeat a failed upload')
    files = commands.add_parser('export', help='export the model of a run to a folder that timm can load')
    card = commands.add_parser('card', help='print the model card; needs no network')
    for command in (push, files, card):
        command.add_argument('folder', metavar='RUN_FOLDER', help='run folder with checkpoints')
        if command is files:
            command.add_argument('target', metavar='TARGET_FOLDER', help='new or empty folder')
        command.add_argument('repo_id', nargs='?', metavar='USER/NAME',
                             help='repository (default: --hub-model-id of the run, and its branch and weights)')
        command.add_argument('--revision', metavar='BRANCH', help='branch (default: main)')
        command.add_argument('--weights', choices=('best', *WEIGHTS),
                             help="weights to use: the weights that the checkpoint's metric belongs to (best), the "
                                  "trained weights (student), their average (ema) or the teacher's weights (teacher) "
                                  '(default: best)')
    push.add_argument('--private', action='store_true', help='make a new repository private')
    push.add_argument('--force', action='store_true', help='overwrite another architecture, or weights of other users')
    files.add_argument('--format', default='timm', choices=('timm', 'onnx'),
                       help='onnx adds model.onnx, with a dynamic batch size, to the files for timm (default: '
                            '%(default)s)')
    files.add_argument('--verify', action='store_true',
                       help='compare the outputs of model.onnx in onnxruntime with the outputs of the model')
    return parser


def _complete(args: argparse.Namespace) -> None:
    """Without a repository, use that of the run with its branch, weights and visibility, or the name of the folder."""
    run: dict[str, Any] = {}
    with suppress(OSError, yaml.YAMLError, TypeError, ValueError):
        run = dict(yaml.safe_load(Path(args.folder, 'args.yaml').read_text(encoding='utf-8')))
    if args.repo_id is None and run.get('hub_model_id'):
        args.repo_id = run['hub_model_id']
        args.revision = args.revision or run.get('hub_revision')
        args.weights = args.weights or run.get('hub_weights')
        args.private = getattr(args, 'private', False) or bool(run.get('hub_private_repo'))
    elif args.repo_id is None and args.command != 'push':
        args.repo_id = 'user/' + re.sub(r'[^A-Za-z0-9_.-]+', '-', os.path.basename(os.path.abspath(args.folder)))
    args.weights = args.weights or 'best'


def _push_folder(args: argparse.Namespace) -> None:
    if not args.repo_id:
        raise UsageError(f'No repository is given. Add its name: {program("hub")} push {shlex.quote(args.folder)} '
                         'user/name')
    limit_waiting()
    with usage_errors(args.repo_id):
        repository = HubRepository(
            args.repo_id, revision=args.revision, private=args.private or None, force=args.force)
        repository.log_in()
        with TemporaryDirectory(prefix='timm-multimix-') as target:
            model = export(args.folder, target, repository.repo_id, revision=args.revision, weights=args.weights)
            check_rebuilds(target, load_file(os.path.join(target, WEIGHTS_NAME)))
            repository.open(model.architecture)
            url = repository.push(target, model.message)
    _logger.info(f'Pushed {model.message}: {url}')
    _logger.info(f"Load it with timm.create_model('hf-hub:{repository.shown}', pretrained=True)")


def _show_card(args: argparse.Namespace) -> None:
    with usage_errors(args.folder), TemporaryDirectory() as target:
        model = export(
            args.folder, target, args.repo_id, revision=args.revision, weights=args.weights, card_only=True)
        _logger.info(f'Model card for {model.origin}:')
        sys.stdout.write(Path(target, CARD_NAME).read_text(encoding='utf-8'))


def _export_folder(args: argparse.Namespace) -> None:
    """Export the model to a folder. After an error there is no incomplete folder."""
    target = os.path.abspath(args.target)
    parent = os.path.dirname(target)
    is_empty = os.path.isdir(target) and not os.path.islink(target) and not os.listdir(target)
    if os.path.lexists(target) and not is_empty:
        raise UsageError(f'{args.target} already exists. Choose a new or empty folder.')
    if args.format == 'onnx':
        check_packages('--format onnx', ['onnx', 'onnxscript', *(['onnxruntime'] if args.verify else [])], extra='onnx')
    elif args.verify:
        raise UsageError('--verify needs --format onnx.')
    with usage_errors(args.target):
        os.makedirs(parent, exist_ok=True)
        with TemporaryDirectory(prefix='timm-multimix-', dir=parent) as temporary:
            files = os.path.join(temporary, 'files')  # the temporary folder itself is private
            os.mkdir(files)
            model = export(args.folder, files, args.repo_id, revision=args.revision, weights=args.weights)
            check_rebuilds(files, load_file(os.path.join(files, WEIGHTS_NAME)))
            if args.format == 'onnx':
                write_onnx(files, args.verify)
            os.replace(files, target)
    _logger.info(f'Exported {model.message} to {args.target}: {model.origin}.')
    _logger.info(f"Load it with timm.create_model('local-dir:{args.target}', pretrained=True)")


def _run(argv: Sequence[str] | None) -> None:
    args = _build_parser().parse_args(argv)
    if not os.path.isdir(args.folder):
        raise UsageError(f'{args.folder}: no such folder.')
    _complete(args)
    dict(push=_push_folder, export=_export_folder, card=_show_card)[args.command](args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-multimix hub`. Return the exit status."""
    return exit_status(lambda: _run(argv))
