"""Model repository on the Hugging Face Hub: access rights, content, and commits on a known parent."""
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_session, get_token, set_client_factory
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id

from ..build.hub_files import CONFIG_NAME, WEIGHTS_NAME, HubError, hub_errors, log_in_hint
from ..common.secrets import contains_token
from .card import CARD_NAME, is_ours

_logger = logging.getLogger(__name__)

REQUEST_TIMEOUT = 90  # seconds; longer than the 60 seconds of the Hub's gateway
RETRY_WAITS = (5, 20, 60, 180)  # seconds. huggingface_hub itself retries uploads, but not the commit.


def limit_waiting(seconds: float | None = REQUEST_TIMEOUT) -> None:
    """Set a timeout for the requests of huggingface_hub in this process. By default there is none.

    Warnings of huggingface_hub are disabled. They contain URLs with short-lived credentials, and a HubError reports the
    last error.
    """
    default = get_session()
    hooks, follow_redirects = default.event_hooks, default.follow_redirects
    set_client_factory(lambda: type(default)(event_hooks=hooks, follow_redirects=follow_redirects, timeout=seconds))
    hub_logging.set_verbosity_error()


class HubRepository:
    """Model repository that a run pushes to.

    Each commit has the commit that was checked before it as its parent. Another architecture, and weights that others
    have pushed in the meantime, are not overwritten unless `force` is set.

    Args:
        repo_id: 'user/name', or 'name' for the namespace of the token's owner.
        revision: Branch to push to. It is created if it does not exist. None for main.
        private: Whether a new repository is private; None for the default of the namespace.
        force: Overwrite existing content by a commit.

    Raises:
        HubError: if the name of the repository is invalid, or a name contains an access token.
    """

    def __init__(self, repo_id: str, *, revision: str | None = None, private: bool | None = None, force: bool = False):
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise HubError(f'{repo_id!r} is not a valid repository name. Use user/name. {error}') from None
        if contains_token(repo_id) or contains_token(revision or ''):
            raise HubError('The name of the repository or of the branch contains an access token.')
        self.repo_id = repo_id
        self.revision = revision
        self.private = private
        self.force = force
        self.api = HfApi(library_name='timm_multimix')
        self._known_weights: set[str | None] = set()  # SHA-256 of the weights before and after our commits

    @property
    def shown(self) -> str:
        """Name of the repository for timm's create_model, without `hf-hub:`."""
        return self.repo_id + (f'@{self.revision}' if self.revision else '')

    def log_in(self) -> None:
        """Check the access token, and complete `repo_id` with the user name.

        Raises:
            HubError: if there is no token, or if it is invalid or read-only.
        """
        with hub_errors('Reading the access token'):
            if not get_token():
                raise HubError(f'There is no access token for the Hugging Face Hub. {log_in_hint()}.')
        with hub_errors('Logging in to the Hugging Face Hub'):
            user = self.api.whoami()
        role = ((user.get('auth') or {}).get('accessToken') or {}).get('role')
        if role == 'read':
            raise HubError(f"The access token of {user['name']} is read-only. {log_in_hint()}.")
        if '/' not in self.repo_id:
            self.repo_id = f'{user["name"]}/{self.repo_id}'

    def open(self, architecture: str) -> None:
        """Create the repository if it does not exist.

        Raises:
            HubError: if the repository cannot be created or written, or contains another architecture.
        """
        with hub_errors(f'Opening {self.repo_id}'):
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            self.api.auth_check(self.repo_id, write=True)
            if self.revision:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            head = self._head()
            self._check_architecture(head, architecture)
        self._known_weights = {_weights_hash(head)}

    def _head(self) -> ModelInfo:
        return self.api.model_info(self.repo_id, revision=self.revision, files_metadata=True)

    def _read(self, head: ModelInfo, name: str) -> str:
        """Return the content of a file, '' if it does not exist."""
        if name not in _file_names(head):
            return ''
        return Path(self.api.hf_hub_download(self.repo_id, name, revision=head.sha)).read_text(encoding='utf-8')

    def _check_architecture(self, head: ModelInfo, architecture: str) -> None:
        if self.force or not {CONFIG_NAME, WEIGHTS_NAME} & _file_names(head):
            return
        existing = json.loads(self._read(head, CONFIG_NAME) or '{}').get('architecture')
        if existing != architecture:
            raise HubError(
                f'{self.shown} contains {f"a {existing}" if existing else "a model that is not a timm model"}, but '
                f'this model is a {architecture}. Choose another name, or overwrite it by a commit with --hub-force '
                '(push: --force).')

    def push(self, folder: str | os.PathLike, message: str, sleep: Callable[[float], Any] | None = None) -> str:
        """Push the files of a folder in one commit. Retry after temporary errors, after `sleep` (time.sleep) returns.

        Unchanged files are not committed. A card that was edited by hand is not replaced.

        Returns:
            URL of the commit, or of the current commit if no file has changed.

        Raises:
            HubError: the last error, if it is permanent or if all attempts failed.
        """
        waits = iter(RETRY_WAITS)
        while True:
            try:
                with hub_errors(f'Pushing to {self.shown}'):
                    return self._commit(Path(folder), message)
            except HubError as error:
                wait = next(waits, None)
                if wait is None or not error.is_temporary:
                    raise
                wait = max(wait, error.retry_after)  # the Hub can request a longer wait
                _logger.warning(f'{error} Retrying in {wait:g} s.')
            (sleep or time.sleep)(wait)

    def _commit(self, folder: Path, message: str) -> str:
        head = self._head()
        files = {path.name: CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())}
        ours, existing = files[WEIGHTS_NAME].upload_info.sha256.hex(), _weights_hash(head)
        if existing not in self._known_weights | {ours} and not self.force:
            raise HubError(
                f'Other weights were pushed to {self.shown} in the meantime (commit {head.sha[:7]}). Push to '
                'another name or revision, or overwrite them by a commit with --hub-force (push: --force).')
        # Added before the commit, because its response can be lost. In this case, the next attempt finds no changes.
        self._known_weights |= {ours, existing}
        if CARD_NAME in files and not is_ours(self._read(head, CARD_NAME)):
            _logger.info(f'The card of {self.shown} was edited by hand and is not replaced.')
            del files[CARD_NAME]
        commit = self.api.create_commit(
            self.repo_id, files.values(), commit_message=message, revision=self.revision, parent_commit=head.sha)
        return str(commit.commit_url)


def _file_names(head: ModelInfo) -> set[str]:
    return {file.rfilename for file in head.siblings or ()}


def _weights_hash(head: ModelInfo) -> str | None:
    """SHA-256 of the weights in a repository, which are an LFS file; None if there are none."""
    files = [file for file in head.siblings or () if file.rfilename == WEIGHTS_NAME and file.lfs]
    return files[0].lfs.sha256 if files else None
