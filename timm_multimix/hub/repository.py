"""Model repository on the Hugging Face Hub: access rights, content, and commits on a known parent."""
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ..build.hub_files import (
    CONFIG_NAME,
    CONFLICT,
    PATIENCE,
    REQUEST_TIMEOUT,
    WEIGHTS_NAME,
    HubError,
    hub_errors,
    log_in_hint,
)
from ..common.secrets import contains_token, remember_token
from .card import CARD_NAME, is_ours

_logger = logging.getLogger(__name__)

RETRY_WAITS = (5, 20, 60, 180)  # seconds, in addition to the retries of huggingface_hub itself
_COMMIT_ATTEMPTS = 5

# Matches names that git does not accept for a branch.
_INVALID_BRANCH = re.compile(r'[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|//|@\{|(^|/)[.-]|\.(/|$)|\.lock(/|$)|^/|/$|^@?$')

T = TypeVar('T')


def limit_waiting(seconds: float = REQUEST_TIMEOUT) -> None:
    """Set a timeout for the requests of huggingface_hub in this process. There is none by default.

    Args:
        seconds: Longest time without data sent or received. The duration of a large upload is not limited.
    """
    from huggingface_hub.utils._http import default_client_factory  # not public

    def with_timeout() -> Any:
        client = default_client_factory()
        client.timeout = seconds
        return client
    set_client_factory(with_timeout)


def with_retries(
        push: Callable[[], T],
        waits: Sequence[float] = RETRY_WAITS,
        sleep: Callable[[float], Any] | None = None,
) -> T:
    """Call a function, and repeat the call after temporary errors.

    Args:
        push: Function to call.
        waits: Seconds to wait after each failure. The Hub can request longer waits.
        sleep: Function that waits; the default is time.sleep.

    Raises:
        HubError: the last error, if it is permanent, if all calls failed, or if the next call would start more than
            10 minutes after the first failure.
    """
    first_failure = None
    for wait in (*waits, None):
        try:
            return push()
        except HubError as error:
            first_failure = first_failure or time.monotonic()
            wait = wait and max(wait, error.retry_after)
            if wait is None or not error.is_temporary or time.monotonic() + wait > first_failure + PATIENCE:
                raise
            _logger.warning(f'{error} Retrying in {wait:g} s.')
            (sleep or time.sleep)(wait)
    raise AssertionError('unreachable')


class _Snapshot(NamedTuple):
    """The files of a repository at one commit."""
    commit: str
    files: dict[str, str]  # SHA-256 of the content for LFS files, git's hash for others


def _hashes(file: CommitOperationAdd) -> tuple[str, str]:
    """SHA-256 and git's hash of a file. A _Snapshot contains one of them."""
    return file.upload_info.sha256.hex(), git_hash(Path(file.path_or_fileobj).read_bytes())


class HubRepository:
    """Model repository that a run pushes to.

    The parent of each commit is the commit that was checked before it. Another architecture, and weights that were
    pushed by others in the meantime, are not overwritten unless `force` is set.

    Args:
        repo_id: 'user/name', or 'name' for the namespace of the token's owner.
        revision: Branch to push to. It is created if it does not exist. None for main.
        private: Whether a new repository is private; None for the default of the namespace.
        force: Overwrite existing content by a commit.

    Raises:
        HubError: if the name of the repository or of the branch is invalid or contains an access token.
    """

    def __init__(self, repo_id: str, *, revision: str | None = None, private: bool | None = None, force: bool = False):
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise HubError(f'{repo_id!r} is not a valid repository name. Use user/name. {error}') from None
        if contains_token(repo_id) or contains_token(revision or ''):
            raise HubError('The name of the repository or of the branch contains an access token.')
        if revision is not None and _INVALID_BRANCH.search(revision):
            raise HubError(
                f'{revision!r} is not a valid branch name. Use letters and digits, separated by - _ . or /.')
        self.repo_id = repo_id
        self.revision = revision
        self.private = private
        self.force = force
        self.api = HfApi(library_name='timm_multimix')
        self._known_weights: set[str | None] = set()

    @property
    def shown(self) -> str:
        """Name of the repository for timm's create_model, without `hf-hub:`."""
        return self.repo_id + (f'@{self.revision}' if self.revision else '')

    def log_in(self) -> None:
        """Check that there is a valid token with write access. Complete `repo_id` with the user name.

        Raises:
            HubError: if there is no token, or if it is invalid or read-only.
        """
        with hub_errors('Reading the access token'):
            token = get_token()
        if not token:
            raise HubError(f'There is no access token for the Hugging Face Hub. {log_in_hint()}.')
        remember_token(token)
        with hub_errors('Logging in to the Hugging Face Hub'):
            user = self.api.whoami()
        role = ((user.get('auth') or {}).get('accessToken') or {}).get('role')
        if role == 'read':
            raise HubError(f"The access token of {user['name']} is read-only. {log_in_hint()}.")
        if '/' not in self.repo_id:
            self.repo_id = f'{user["name"]}/{self.repo_id}'

    def open(self, architecture: str) -> None:
        """Create the repository if it does not exist, and check the write access and the architecture.

        Args:
            architecture: timm's name of the model.

        Raises:
            HubError: if the repository cannot be created or written, or contains another architecture.
        """
        with hub_errors(f'Opening {self.repo_id}'):
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            self.api.auth_check(self.repo_id, write=True)
            if self.revision:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            snapshot = self._snapshot()
            self._check_architecture(snapshot, architecture)
        self._known_weights = {snapshot.files.get(WEIGHTS_NAME)}

    def _snapshot(self) -> _Snapshot:
        info = self.api.model_info(
            self.repo_id, revision=self.revision, files_metadata=True, timeout=REQUEST_TIMEOUT)
        return _Snapshot(info.sha, {
            file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()})

    def _read(self, snapshot: _Snapshot, name: str) -> str | None:
        if name not in snapshot.files:
            return None
        try:
            path = self.api.hf_hub_download(self.repo_id, name, revision=snapshot.commit)
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding='utf-8')

    def _check_architecture(self, snapshot: _Snapshot, architecture: str) -> None:
        if self.force or not {CONFIG_NAME, WEIGHTS_NAME} & set(snapshot.files):
            return
        try:
            config = json.loads(self._read(snapshot, CONFIG_NAME) or '{}')
        except ValueError:
            config = {}
        existing = config.get('architecture') if isinstance(config, dict) else None
        if existing != architecture:
            raise HubError(
                f'{self.shown} contains {f"a {existing}" if existing else "a model that is not a timm model"}, but '
                f'this model is a {architecture}. Choose another name, or overwrite it by a commit with --hub-force '
                '(push: --force).')

    def _check_weights(self, snapshot: _Snapshot, weights: str) -> None:
        existing = snapshot.files.get(WEIGHTS_NAME)
        if self._known_weights and existing not in self._known_weights | {weights} and not self.force:
            raise HubError(
                f'Other weights were pushed to {self.shown} in the meantime (commit {snapshot.commit[:7]}). Push to '
                'another name or revision, or overwrite them by a commit with --hub-force (push: --force).')

    def commit(self, folder: str | os.PathLike, message: str) -> str:
        """Push the files of a folder in one commit.

        A card in the repository that was edited by hand is not replaced.

        Args:
            folder: Folder with config.json, model.safetensors and further files such as README.md.
            message: Commit message.

        Returns:
            URL of the commit, or of the current commit if no file has changed.

        Raises:
            HubError: if the commit fails.
        """
        folder = Path(folder)
        for attempt in range(_COMMIT_ATTEMPTS):
            try:
                with hub_errors(f'Pushing to {self.shown}'):
                    return self._commit(folder, message)
            except HubError as error:
                if error.status not in CONFLICT or attempt == _COMMIT_ATTEMPTS - 1:
                    raise
        raise AssertionError('unreachable')

    def _commit(self, folder: Path, message: str) -> str:
        files = {path.name: CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())}
        weights = files[WEIGHTS_NAME].upload_info.sha256.hex()
        snapshot = self._snapshot()
        self._check_architecture(snapshot, json.loads((folder / CONFIG_NAME).read_text())['architecture'])
        self._check_weights(snapshot, weights)
        # Added before the commit, because its response can be lost.
        self._known_weights |= {weights, snapshot.files.get(WEIGHTS_NAME)}
        if CARD_NAME in files and not is_ours(self._read(snapshot, CARD_NAME)):
            _logger.info(f'The card of {self.shown} was edited by hand and is not replaced.')
            del files[CARD_NAME]
        if all(snapshot.files.get(name) in _hashes(file) for name, file in files.items()):
            return f'{self.api.endpoint}/{self.repo_id}/commit/{snapshot.commit}'
        info = self.api.create_commit(
            self.repo_id,
            files.values(),
            commit_message=message,
            revision=self.revision,
            parent_commit=snapshot.commit,
        )
        return str(info.commit_url)


