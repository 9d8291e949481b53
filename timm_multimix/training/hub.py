"""Push runs to the Hugging Face Hub, in the background during training or later from the run folder."""
import argparse
import json
import logging
import os
import queue
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import yaml
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file
from timm.utils.distributed import world_info_from_env

from ..common.console import setup_logging
from ..common.errors import UsageError, usage_errors
from ..common.files import create, duplicate, remove_work_folders, work_folder
from ..hub import (
    CARD_NAME,
    CONFIG_NAME,
    CURVE_NAME,
    PATIENCE,
    RETRY_WAITS,
    WEIGHTS_NAME,
    HubError,
    HubRepository,
    check_rebuilds,
    limit_waiting,
    redact,
    with_retries,
)
from .export import export, plain_weights
from .run import Run
from .saved_weights import WEIGHTS

_logger = logging.getLogger(__name__)

_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]


def _model_folder(folder: str):
    """Create a temporary folder for a model, on the disk of the run if it is writable."""
    return work_folder(folder if os.access(folder, os.W_OK) else gettempdir())


def _push_command(folder: str, repository: HubRepository, weights: str) -> str:
    options = ['--revision', repository.revision] if repository.revision else []
    options += ['--private'] if repository.private else []
    options += ['--weights', weights] if weights != 'best' else []
    return shlex.join(['python', '-m', 'timm_multimix.hub', 'push', folder, repository.repo_id, *options])


class HubPush:
    """Push checkpoints of a run in the background, and its result at the end.

    Create it with `start`. Only the first process pushes. Errors after the start of training are logged and do not
    stop the run.

    Args:
        args: Arguments of the run.
        repository: Repository after `log_in`.
    """
    retry_waits: Sequence[float] = RETRY_WAITS
    patience: float = PATIENCE  # seconds to wait for the last upload

    def __init__(self, args: argparse.Namespace, repository: HubRepository):
        self.args = args
        self.repository = repository
        self.folder = ''
        self._jobs: queue.Queue[tuple[ExitStack, str] | None] = queue.Queue()  # checkpoints to push
        self._thread = threading.Thread(target=self._work, name='hub', daemon=True)
        self._stopped = threading.Event()  # queued checkpoints are not pushed
        self._is_complete = False  # the run has ended normally
        self._finished = threading.Event()
        self._error = ''  # error of the last push
        self._last_saved: tuple[int, int] | None = None  # inode and time of the last checkpoint in the queue
        self._logged_url = ''

    @classmethod
    def start(cls, args: argparse.Namespace) -> 'HubPush | None':
        """Check the repository name and log in, before the model is built.

        Returns:
            The HubPush, or None if this process does not push.

        Raises:
            UsageError: if there is no token with write access, or if the name is invalid.
        """
        if not args.push_to_hub or args.validate or world_info_from_env()[1] != 0:
            return None
        limit_waiting()
        return cls(args, cls._logged_in(args, os.path.basename(args.experiment) or 'run'))

    @staticmethod
    def _logged_in(args: argparse.Namespace, name: str) -> HubRepository:
        with usage_errors('--push-to-hub'):
            repository = HubRepository(
                args.hub_model_id or name, revision=args.hub_revision, private=args.hub_private_repo or None,
                force=args.hub_force)
            repository.log_in()
        return repository

    def begin(self, run: Run) -> None:
        """Open the repository and start the thread. Call it before training, after config.json was written.

        Raises:
            UsageError: if the model cannot be pushed to the repository.
        """
        self.folder = run.folder
        if not self.args.hub_model_id:
            self.repository = self._logged_in(self.args, os.path.basename(run.folder))
        remove_work_folders(self.folder)
        with usage_errors('--push-to-hub'):
            # Not in the thread, because building a model draws random numbers.
            check_rebuilds(self.folder, plain_weights(run.task.get_checkpoint_state()['state_dict']))
            with open(os.path.join(self.folder, CONFIG_NAME), encoding='utf-8') as file:
                self.repository.open(json.load(file)['architecture'])
        pushed = {'end': 'the best checkpoint at the end', 'best': 'every new best checkpoint',
                  'every_save': 'every checkpoint'}[self.args.hub_strategy]
        _logger.info(f'Pushing {pushed} to {self.repository.api.endpoint}/{self.repository.repo_id}')
        disable_progress_bars()  # they would overwrite the progress bar of the epoch
        self._thread.start()

    def after_save(self, is_best: bool) -> None:
        """Push the last checkpoint in the background if it is new and --hub-strategy selects it. Returns immediately.

        Args:
            is_best: Whether the checkpoint is the best one so far.
        """
        strategy = self.args.hub_strategy
        if strategy == 'end' or (strategy == 'best' and not is_best):
            return
        if self._jobs.unfinished_tasks and not self.args.hub_always_push:
            return
        last = os.path.join(self.folder, 'last.pth.tar')
        try:
            saved = os.stat(last)
            if self._last_saved == (saved.st_ino, saved.st_mtime_ns):
                return  # this epoch saved no checkpoint
            self._last_saved = saved.st_ino, saved.st_mtime_ns
            with ExitStack() as stack:
                # A second link preserves the checkpoint when training replaces it.
                path = os.path.join(stack.enter_context(work_folder(self.folder)), 'checkpoint.pth.tar')
                duplicate(last, path)
                self._jobs.put((stack.pop_all(), path))
        except OSError as error:
            _logger.warning(f'The checkpoint was not pushed: {error}')

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with job[0]:
                self._push_checkpoint(job[1])
            self._jobs.task_done()
        if self._is_complete:
            try:
                self._push(None)
            except Exception as error:  # logged by finish(), because the run itself is complete
                _logger.debug('', exc_info=True)
                self._error = str(error)
        self._finished.set()

    def _push_checkpoint(self, path: str) -> None:
        try:
            if not self._stopped.is_set():
                self._push(path, self._sleep)
        except Exception as error:  # must not stop training
            if not self._stopped.is_set():
                _logger.warning(f'The checkpoint was not pushed: {error}')
                _logger.debug('', exc_info=True)

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise HubError('The run has ended.')

    def _push(self, checkpoint_path: str | None, sleep: Callable[[float], Any] | None = None) -> None:
        with _model_folder(self.folder) as target:
            model = export(
                self.folder, target, self.repository.repo_id, revision=self.repository.revision,
                weights=self.args.hub_weights, checkpoint_path=checkpoint_path)
            url = with_retries(lambda: self.repository.commit(target, model.message), self.retry_waits, sleep)
        if url != self._logged_url:  # unchanged if there was nothing to commit
            _logger.info(f'Pushed {model.message}: {url}')
        self._logged_url = url

    def finish(self) -> None:
        """Push the result of the run, and wait at most 10 minutes for the upload.

        If the upload fails or takes longer, the command that pushes the run is logged.
        """
        if not self.args.hub_always_push:
            self._stopped.set()  # queued checkpoints are older than the result
        self._is_complete = True
        self._jobs.put(None)
        try:
            if not self._wait():
                self._log_command(f'The upload took longer than {self.patience / 60:g} minutes.')
            elif self._error:
                self._log_command(self._error)
        except KeyboardInterrupt:
            self._log_command('The upload was interrupted.')
            raise

    def _wait(self) -> bool:
        deadline = time.monotonic() + self.patience
        while not self._finished.wait(min(0.5, self.patience)):  # a signal to another thread does not interrupt wait()
            if time.monotonic() > deadline:
                return False
        return True

    def abandon(self) -> None:
        """Stop pushing without waiting, after the user stopped the run."""
        self._stopped.set()
        self._jobs.put(None)

    def _log_command(self, reason: str) -> None:
        _logger.error(
            f'{reason} The run itself is complete in {self.folder}. Finish the upload with\n  '
            + _push_command(self.folder, self.repository, self.args.hub_weights))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(redact(message))


def _command_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog='python -m timm_multimix.hub',
        description='Push the model of a run to the Hugging Face Hub, export it to a folder in the same format, or '
                    'print its model card. Only push needs an access token, from `hf auth login` or HF_TOKEN.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='{push,export,card}', parser_class=_Parser)
    push = commands.add_parser('push', help='push the model of a run, or repeat a failed upload')
    files = commands.add_parser('export', help='export the model of a run to a folder that timm can load')
    card = commands.add_parser('card', help='print the model card; needs no network')
    for command in (push, files, card):
        command.add_argument('folder', metavar='RUN_FOLDER', help='run folder with checkpoints')
        if command is files:
            command.add_argument('target', metavar='TARGET_FOLDER', help='new or empty folder')
        command.add_argument('repo_id', nargs='?', metavar='USER/NAME',
                             help='repository (default: --hub-model-id of the run)')
        command.add_argument('--revision', metavar='BRANCH', help='branch (default: main)')
        command.add_argument('--weights', default='best', choices=('best', *WEIGHTS),
                             help='weights to use: the evaluated weights of the best metric (best), the trained '
                                  'weights (student), their average (ema) or the teacher (default: %(default)s)')
    push.add_argument('--private', action='store_true', help='make a new repository private')
    push.add_argument('--force', action='store_true', help='overwrite another architecture, or weights of other users')
    card.add_argument('--output', metavar='DIR', help='write the card and its image to this folder')
    return parser


def _repo_id_of(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, 'args.yaml'), encoding='utf-8') as file:
            return (yaml.safe_load(file) or {}).get('hub_model_id')
    except (OSError, yaml.YAMLError, AttributeError):
        return None


def _push_folder(args: argparse.Namespace, repo_id: str) -> None:
    with usage_errors(repo_id):
        repository = HubRepository(
            repo_id, revision=args.revision, private=args.private or None, force=args.force)
        repository.log_in()
        with _model_folder(args.folder) as target:
            model = export(args.folder, target, repository.repo_id, revision=args.revision, weights=args.weights)
            check_rebuilds(target, load_file(os.path.join(target, WEIGHTS_NAME)))
            repository.open(model.architecture)
            url = with_retries(lambda: repository.commit(target, model.message))
    _logger.info(f'Pushed {model.message}: {url}')
    _logger.info(f"Load it with timm.create_model('hf-hub:{repository.shown}', pretrained=True)")


def _show_card(args: argparse.Namespace, repo_id: str) -> None:
    with TemporaryDirectory() as target:
        with usage_errors(args.folder):
            model = export(args.folder, target, repo_id, revision=args.revision, weights=args.weights, card_only=True)
        _logger.info(f'Model card for {model.origin}:')
        if args.output is None:
            sys.stdout.write(Path(target, CARD_NAME).read_text(encoding='utf-8'))
            return
        with usage_errors(f'--output {args.output}'):
            os.makedirs(args.output, exist_ok=True)
            for name in (CARD_NAME, CURVE_NAME):
                if os.path.isfile(os.path.join(target, name)):
                    with create(os.path.join(args.output, name)) as file:
                        file.write(Path(target, name).read_bytes())


def _export_folder(args: argparse.Namespace, repo_id: str) -> None:
    """Export the model to a folder. After an error there is no incomplete folder."""
    target = os.path.abspath(args.target)
    parent = os.path.dirname(target)
    is_empty = os.path.isdir(target) and not os.path.islink(target) and not os.listdir(target)
    if os.path.lexists(target) and not is_empty:
        raise UsageError(f'{args.target} already exists. Give a new or empty folder.')
    with usage_errors(args.target):
        os.makedirs(parent, exist_ok=True)
        remove_work_folders(parent)
        with work_folder(parent) as temporary:
            model = export(args.folder, temporary, repo_id, revision=args.revision, weights=args.weights)
            check_rebuilds(temporary, load_file(os.path.join(temporary, WEIGHTS_NAME)))
            os.replace(temporary, target)
    _logger.info(f'Exported {model.message} to {args.target}: {model.origin}.')
    _logger.info(f"Load it with timm.create_model('local-dir:{args.target}', pretrained=True)")


class _Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP was received."""


@contextmanager
def _terminated_by_signals() -> Iterator[None]:
    """Raise _Terminated for SIGTERM and SIGHUP, so that temporary files are removed."""
    def stop(number: int, frame: Any):
        raise _Terminated(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, stop) for number in _SIGNALS if in_main_thread}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _run_command(argv: Sequence[str] | None) -> None:
    args = _command_parser().parse_args(argv)
    if not os.path.isdir(args.folder):
        raise UsageError(f'{args.folder}: no such folder.')
    remove_work_folders(args.folder)
    repo_id = args.repo_id or _repo_id_of(args.folder)
    if args.command != 'push':
        act = _show_card if args.command == 'card' else _export_folder
        name = re.sub(r'[^A-Za-z0-9_.-]+', '-', os.path.basename(os.path.abspath(args.folder)))
        act(args, repo_id or f'user/{name}')
    elif repo_id:
        limit_waiting()
        _push_folder(args, repo_id)
    else:
        raise UsageError(f'No repository is given. Give its name: push {args.folder} user/name')


def command(argv: Sequence[str] | None = None) -> int:
    """Run `python -m timm_multimix.hub`.

    Returns:
        Exit status: 0, 2 after an error that the user can fix, 130 after Ctrl-C, 143 after SIGTERM.
    """
    setup_logging()
    try:
        with _terminated_by_signals():
            _run_command(argv)
    except UsageError as error:
        _logger.error(error)
        return 2
    except KeyboardInterrupt as error:
        _logger.error('Interrupted. The run folder is unchanged; run the same command again.')
        return 128 + (error.args[0] if isinstance(error, _Terminated) else signal.SIGINT)
    return 0


if __name__ == '__main__':
    sys.exit(command())
