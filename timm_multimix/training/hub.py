"""Push the checkpoints of a run to the Hugging Face Hub in the background."""
import argparse
import json
import logging
import os
import queue
import threading
import time
from contextlib import suppress
from tempfile import TemporaryDirectory

from huggingface_hub.utils import disable_progress_bars
from timm.utils.distributed import world_info_from_env

from ..build.hub_files import CONFIG_NAME, PATIENCE, HubError
from ..build.saved_weights import plain_weights
from ..common.errors import usage_errors
from ..common.files import duplicate, remove_temporary
from ..hub.command import push_command
from ..hub.export import export
from ..hub.models import check_rebuilds
from ..hub.repository import HubRepository, limit_waiting
from .setup import Setup

_logger = logging.getLogger(__name__)


class HubPush:
    """Push checkpoints of a run in a daemon thread, and its result at the end.

    huggingface_hub's own background uploads (`run_as_future`) would block the exit of the interpreter. Create it with
    `start`. Only the first process pushes. Errors after the start of training are logged and do not stop the run.
    """
    patience: float = PATIENCE  # seconds to wait for the last upload

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self._log_in(os.path.basename(args.experiment) or 'run')
        self.folder = ''
        self._jobs: queue.Queue[str | None] = queue.Queue()  # checkpoints, '' for the result; None ends the thread
        self._thread = threading.Thread(target=self._work, name='hub', daemon=True)
        self._stopped = threading.Event()  # queued checkpoints are not pushed
        self._error = ''  # why the result was not pushed
        self._logged_url = ''

    @classmethod
    def start(cls, args: argparse.Namespace) -> 'HubPush | None':
        """Check the repository name and log in, before the model is built. Return None if this process does not push.

        Raises:
            UsageError: if there is no token with write access, or if the name is invalid.
        """
        if not args.push_to_hub or args.validate or world_info_from_env()[1] != 0:
            return None
        limit_waiting()
        return cls(args)

    def _log_in(self, name: str) -> None:
        args = self.args
        with usage_errors('--push-to-hub'):
            self.repository = HubRepository(
                args.hub_model_id or name, revision=args.hub_revision, private=args.hub_private_repo or None,
                force=args.hub_force)
            self.repository.log_in()

    def begin(self, setup: Setup) -> None:
        """Open the repository and start the thread. Call it before training, after config.json was written.

        Raises:
            UsageError: if the model cannot be pushed to the repository.
        """
        self.folder = setup.folder
        if not self.args.hub_model_id:
            self._log_in(os.path.basename(setup.folder))
        with usage_errors('--push-to-hub'):
            # Not in the thread, because building a model draws random numbers.
            check_rebuilds(self.folder, plain_weights(setup.task.get_checkpoint_state()['state_dict']))
            with open(os.path.join(self.folder, CONFIG_NAME), encoding='utf-8') as file:
                self.repository.open(json.load(file)['architecture'])
        url = f'{self.repository.api.endpoint}/{self.repository.repo_id}'
        _logger.info(f'Pushing to {url} with --hub-strategy {self.args.hub_strategy}.')
        disable_progress_bars()  # they would overwrite the progress bar of the epoch
        self._thread.start()

    def after_save(self, is_best: bool) -> None:
        """Push the last checkpoint, which was just saved, in the background if --hub-strategy selects it."""
        strategy = self.args.hub_strategy
        is_busy = self._jobs.unfinished_tasks and not self.args.hub_always_push
        if strategy == 'end' or (strategy == 'best' and not is_best) or is_busy:
            return
        # A second link preserves the checkpoint when training replaces it. remove_temporary removes it after a crash.
        path = os.path.join(self.folder, f'hub-{time.monotonic_ns()}.tmp')
        try:
            duplicate(os.path.join(self.folder, 'last.pth.tar'), path)
            self._jobs.put(path)
        except OSError as error:
            _logger.warning(f'The checkpoint was not pushed: {error}')

    def _work(self) -> None:
        for path in iter(self._jobs.get, None):
            try:
                if not path or not self._stopped.is_set():
                    self._push(path)
            except Exception as error:  # must not stop training
                _logger.debug('', exc_info=True)
                if not path:
                    self._error = str(error)
                elif not self._stopped.is_set():
                    _logger.warning(f'The checkpoint was not pushed: {error}')
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._jobs.task_done()

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise HubError('The run has ended.')

    def _push(self, path: str) -> None:
        """Push a checkpoint, or the result of the run if `path` is empty."""
        with TemporaryDirectory(prefix='timm-multimix-') as target:
            model = export(
                self.folder, target, self.repository.repo_id, revision=self.repository.revision,
                weights=self.args.hub_weights, checkpoint_path=path)
            url = self.repository.push(target, model.message, sleep=self._sleep if path else None)
        if url != self._logged_url:  # unchanged if there was nothing to commit
            _logger.info(f'Pushed {model.message}: {url}')
        self._logged_url = url

    def finish(self) -> None:
        """Push the result of the run, and wait at most 10 minutes for the upload.

        If the upload fails or takes longer, the command that pushes the run is logged.
        """
        if not self.args.hub_always_push:
            self._stopped.set()  # queued checkpoints are older than the result
        self._jobs.put('')
        self._jobs.put(None)
        deadline = time.monotonic() + self.patience
        try:
            while self._thread.is_alive() and time.monotonic() < deadline:
                self._thread.join(min(0.5, self.patience))  # a signal to another thread does not interrupt it
        except KeyboardInterrupt:
            self._log_command('The upload was interrupted.')
            raise
        finally:
            remove_temporary(self.folder)
        if self._thread.is_alive():
            self._log_command(f'The upload took longer than {self.patience / 60:g} minutes.')
        elif self._error:
            self._log_command(self._error)

    def abandon(self) -> None:
        """Stop pushing without waiting, after the user stopped the run."""
        self._stopped.set()
        self._jobs.put(None)
        remove_temporary(self.folder)

    def _log_command(self, reason: str) -> None:
        _logger.error(
            f'{reason} The run itself is complete in {self.folder}. Finish the upload with\n  '
            + push_command(self.folder, self.repository, self.args.hub_weights))
