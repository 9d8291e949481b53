"""Pushing runs to the Hugging Face Hub: in the background while they train, or afterwards from their folder."""
import argparse
import glob
import json
import logging
import os
import queue
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file
from timm.utils.distributed import world_info_from_env

from ..hub import (
    CARD_NAME,
    CONFIG_NAME,
    CURVE_NAME,
    RETRY_WAITS,
    WEIGHTS_NAME,
    HubError,
    HubRepository,
    check_rebuilds,
    redact,
    with_retries,
)
from .errors import UsageError, blame
from .export import export, plain_weights
from .files import duplicate
from .logs import setup_logging
from .run import Run
from .saved_weights import WEIGHTS

_logger = logging.getLogger(__name__)

_WORK_FOLDER = '.hub-'


@contextmanager
def _work_folder(folder: str) -> Iterator[str]:
    """A folder for a model on its way, on the disk of the run, which has room for models."""
    with TemporaryDirectory(prefix=_WORK_FOLDER, dir=folder if os.access(folder, os.W_OK) else None) as path:
        yield path


def _push_command(folder: str, repository: HubRepository, weights: str) -> str:
    options = ['--revision', repository.revision] if repository.revision else []
    options += ['--private'] if repository.private else []
    options += ['--weights', weights] if weights != 'best' else []
    return shlex.join(['python', '-m', 'timm_multimix.hub', 'push', folder, repository.repo_id, *options])


class HubPush:
    """Pushes a run while it trains, from a thread that nothing waits for, and at its end.

    Made by `start`, in the first process only. What goes wrong after training began is told, and never stops it.

    Args:
        args: Arguments of the run.
        repository: Where to; logged in.
    """
    retry_waits: Sequence[float] = RETRY_WAITS

    def __init__(self, args: argparse.Namespace, repository: HubRepository):
        self.args = args
        self.repository = repository
        self.folder = ''
        self._jobs: queue.Queue[TemporaryDirectory | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name='hub', daemon=True)
        self._stopped = threading.Event()
        self._seen: tuple[int, int] | None = None  # the checkpoint that was looked at last
        self._told = ''  # the commit that the user was told of last

    @classmethod
    def start(cls, args: argparse.Namespace) -> 'HubPush | None':
        """Log in, before anything is built. Returns None unless this process is to push.

        Raises:
            UsageError: if there is no token that may write, or the name cannot be one.
        """
        if not args.push_to_hub or args.validate or world_info_from_env()[1] != 0:
            return None
        return cls(args, cls._logged_in(args, os.path.basename(args.experiment) or 'run'))

    @staticmethod
    def _logged_in(args: argparse.Namespace, name: str) -> HubRepository:
        with blame('--push-to-hub'):
            repository = HubRepository(
                args.hub_model_id or name, revision=args.hub_revision, private=args.hub_private_repo or None,
                force=args.hub_force)
            repository.log_in()
        return repository

    def begin(self, run: Run) -> None:
        """Open the repository, and start the thread; call it before training, when the folder holds config.json.

        Raises:
            UsageError: if the model cannot be pushed there.
        """
        self.folder = run.folder
        if not self.args.hub_model_id:
            self.repository = self._logged_in(self.args, os.path.basename(run.folder))
        for leftover in glob.glob(os.path.join(glob.escape(self.folder), _WORK_FOLDER + '*')):
            shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed
        with blame('--push-to-hub'):
            # Here and not in the thread: making a model draws random numbers.
            check_rebuilds(self.folder, plain_weights(run.task.get_checkpoint_state()['state_dict']))
            with open(os.path.join(self.folder, CONFIG_NAME), encoding='utf-8') as file:
                self.repository.open(json.load(file)['architecture'])
        _logger.info(f'Pushing to {self.repository.api.endpoint}/{self.repository.repo_id} '
                     + {'end': 'at the end.', 'best': 'every new best.', 'every_save': 'every checkpoint.'}[
                         self.args.hub_strategy])
        disable_progress_bars()  # two bars on one terminal are none
        self._thread.start()

    def after_save(self, is_best: bool) -> None:
        """Push the last checkpoint in the background, if it is new and the strategy says so; returns at once.

        Args:
            is_best: Whether it is the best so far.
        """
        strategy = self.args.hub_strategy
        if strategy == 'end' or (strategy == 'best' and not is_best):
            return
        if self._jobs.unfinished_tasks and not self.args.hub_always_push:
            return
        last = os.path.join(self.folder, 'last.pth.tar')
        try:
            saved = os.stat(last)
            if self._seen == (saved.st_ino, saved.st_mtime_ns):
                return  # an epoch that saved nothing
            self._seen = saved.st_ino, saved.st_mtime_ns
            # Training goes on to replace its checkpoints; another name keeps this one.
            job = TemporaryDirectory(prefix=_WORK_FOLDER, dir=self.folder)
            kept = os.path.join(job.name, 'checkpoint.pth.tar')
            duplicate(last, kept)
        except OSError as error:
            _logger.warning(f'This checkpoint is not pushed: {error}')
            return
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if not self._stopped.is_set():
                    self._push(os.path.join(job.name, 'checkpoint.pth.tar'), self._sleep)
            except Exception as error:  # training goes on whatever happens here
                if not self._stopped.is_set():
                    _logger.warning(f'This checkpoint is not pushed: {error}')
                    _logger.debug('', exc_info=True)
            finally:
                job.cleanup()
                self._jobs.task_done()

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise HubError('The run has ended.')

    def _push(self, checkpoint_path: str | None, sleep: Callable[[float], Any] | None = None) -> None:
        with _work_folder(self.folder) as target:
            model = export(
                self.folder, target, self.repository.repo_id, revision=self.repository.revision,
                weights=self.args.hub_weights, checkpoint_path=checkpoint_path)
            url = with_retries(lambda: self.repository.commit(target, model.message), self.retry_waits, sleep)
        if url != self._told:  # else it was there already
            _logger.info(f'Pushed {model.message}: {url}')
        self._told = url

    def finish(self) -> None:
        """Push the result of the run, and wait for it. A failure is told, with the command that finishes it later."""
        if not self.args.hub_always_push:
            self._stopped.set()  # what waits to be pushed is older than what comes now
        self._jobs.put(None)
        try:
            self._thread.join()
            self._push(None)
        except KeyboardInterrupt:
            self._tell_how_to_finish('The upload was interrupted.')
            raise
        except Exception as error:  # of a library, or a full disk: the run is complete all the same
            _logger.debug('', exc_info=True)
            self._tell_how_to_finish(str(error))

    def abandon(self) -> None:
        """Stop pushing, without waiting: the user stopped the run."""
        self._stopped.set()
        self._jobs.put(None)

    def _tell_how_to_finish(self, why: str) -> None:
        _logger.error(
            f'{why} The run itself is complete in {self.folder}. Finish the upload with\n  '
            + _push_command(self.folder, self.repository, self.args.hub_weights))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(redact(message))


def _command_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog='python -m timm_multimix.hub',
        description='Push the model of a run to the Hugging Face Hub, write it into a folder as it would be there, or '
                    'show its card. The token comes from `hf auth login` or HF_TOKEN; only push needs it.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='{push,export,card}', parser_class=_Parser)
    push = commands.add_parser('push', help='push the model of a run, or finish an upload that failed')
    files = commands.add_parser('export', help='write the model of a run into a folder that timm loads')
    card = commands.add_parser('card', help='show the card that it would have; needs no network')
    for command in (push, files, card):
        command.add_argument('folder', metavar='RUN_FOLDER', help='folder of the run, with its checkpoints')
        if command is files:
            command.add_argument('target', metavar='TARGET_FOLDER', help='folder to make')
        command.add_argument('repo_id', nargs='?', metavar='USER/NAME',
                             help='repository (default: --hub-model-id of the run)')
        command.add_argument('--revision', metavar='BRANCH', help='branch (default: main)')
        command.add_argument('--weights', default='best', choices=('best', *WEIGHTS),
                             help='which weights: those that gave the metric (best), the trained ones, their average, '
                                  "or the teacher's (default: %(default)s)")
    push.add_argument('--private', action='store_true', help='make the repository private, if it is made now')
    push.add_argument('--force', action='store_true', help='push over another architecture, or the weights of others')
    card.add_argument('--output', metavar='DIR', help='write the card and its picture here instead of printing it')
    return parser


def _repo_id_of(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, 'args.yaml'), encoding='utf-8') as file:
            return (yaml.safe_load(file) or {}).get('hub_model_id')
    except (OSError, yaml.YAMLError, AttributeError):
        return None


def _push_folder(args: argparse.Namespace, repo_id: str) -> None:
    with blame(repo_id):
        repository = HubRepository(
            repo_id, revision=args.revision, private=args.private or None, force=args.force)
        repository.log_in()
        with _work_folder(args.folder) as target:
            model = export(args.folder, target, repository.repo_id, revision=args.revision, weights=args.weights)
            check_rebuilds(target, load_file(os.path.join(target, WEIGHTS_NAME)))
            repository.open(model.architecture)
            url = with_retries(lambda: repository.commit(target, model.message))
    _logger.info(f'Pushed {model.message}: {url}')
    _logger.info(f"Load it with timm.create_model('hf-hub:{repository.shown}', pretrained=True)")


def _show_card(args: argparse.Namespace, repo_id: str) -> None:
    with TemporaryDirectory() as target:
        with blame(args.folder):
            model = export(args.folder, target, repo_id, revision=args.revision, weights=args.weights, card_only=True)
        _logger.info(f'The card of {model.origin}:')
        if args.output is None:
            sys.stdout.write(Path(target, CARD_NAME).read_text(encoding='utf-8'))
            return
        with blame(f'--output {args.output}'):
            os.makedirs(args.output, exist_ok=True)
            for name in (CARD_NAME, CURVE_NAME):
                if os.path.isfile(os.path.join(target, name)):
                    shutil.copy(os.path.join(target, name), args.output)


def _export_folder(args: argparse.Namespace, repo_id: str) -> None:
    """Write the model into a folder, which is there as a whole or not at all."""
    target = os.path.abspath(args.target)
    if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise UsageError(f'{args.target} is there already. Give a folder to make.')
    with blame(args.target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with TemporaryDirectory(prefix=_WORK_FOLDER, dir=os.path.dirname(target)) as work:
            written = os.path.join(work, 'model')
            os.mkdir(written)  # open to whom new folders are
            model = export(args.folder, written, repo_id, revision=args.revision, weights=args.weights)
            check_rebuilds(written, load_file(os.path.join(written, WEIGHTS_NAME)))
            os.replace(written, target)
    _logger.info(f'Wrote {model.message} into {args.target}: {model.origin}.')
    _logger.info(f"Load it with timm.create_model('local-dir:{args.target}', pretrained=True)")


def command(argv: Sequence[str] | None = None) -> int:
    """Run `python -m timm_multimix.hub`.

    Returns:
        Exit status: 0, 2 for something that the user can put right, 130 after Ctrl-C.
    """
    setup_logging()
    try:
        args = _command_parser().parse_args(argv)
        if not os.path.isdir(args.folder):
            raise UsageError(f'{args.folder}: no such folder.')
        repo_id = args.repo_id or _repo_id_of(args.folder)
        if args.command != 'push':
            act = _show_card if args.command == 'card' else _export_folder
            act(args, repo_id or f'user/{os.path.basename(os.path.abspath(args.folder))}')
        elif repo_id:
            _push_folder(args, repo_id)
        else:
            raise UsageError(f'Where to? Give a repository: push {args.folder} user/name')
    except UsageError as error:
        _logger.error(error)
        return 2
    except KeyboardInterrupt:
        _logger.error('Interrupted. The run is as it was; run the same command again.')
        return 130
    return 0
