"""Push runs to the Hugging Face Hub, in the background during training or later from the run folder."""
import argparse
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from timm.utils.distributed import world_info_from_env

from ..common.errors import usage_errors
from ..common.files import duplicate, remove_work_folders, work_folder
from ..hub import (
    CONFIG_NAME,
    PATIENCE,
    RETRY_WAITS,
    HubError,
    HubRepository,
    check_rebuilds,
    limit_waiting,
    with_retries,
)
from ..hub.command import model_folder, push_command
from ..hub.export import export, plain_weights
from .run import Run

_logger = logging.getLogger(__name__)


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
        with model_folder(self.folder) as target:
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
            + push_command(self.folder, self.repository, self.args.hub_weights))
