"""A model repository on the Hugging Face Hub: access rights, content, and commits on top of a known state."""
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, download_from_hf

from ..common.secrets import contains_token, redact, remember_token
from .card import CARD_NAME, is_ours

_logger = logging.getLogger(__name__)

CONFIG_NAME = 'config.json'
WEIGHTS_NAME = HF_SAFE_WEIGHTS_NAME
RETRY_WAITS = (5, 20, 60, 180)  # seconds; huggingface_hub has tried several times by itself before the first of them
_ANSWER_TIMEOUT = 90  # seconds; a gateway of the Hub gives up after 60
PATIENCE = 600  # seconds to wait for the Hub in total
_COMMIT_ATTEMPTS = 5
_TOKENS_PAGE = 'https://huggingface.co/settings/tokens'

_CONFLICT = (409, 412)  # somebody else's commit came first
_TEMPORARY = (408, 429, 500, 502, 503, 504)
# As git wants the name of a branch.
_NO_BRANCH = re.compile(r'[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|//|@\{|(^|/)[.-]|\.(/|$)|\.lock(/|$)|^/|/$|^@?$')
# What trying again does not mend. Other errors come from the network.
_PERMANENT_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, FileNotFoundError,
                     PermissionError)

T = TypeVar('T')


def limit_waiting(seconds: float = _ANSWER_TIMEOUT) -> None:
    """Give the requests of huggingface_hub in this process a timeout. They have none otherwise.

    Args:
        seconds: Longest time in which nothing is sent or received. A large upload may take as long as it needs.
    """
    from huggingface_hub.utils._http import default_client_factory  # not public

    def with_timeout():
        client = default_client_factory()
        client.timeout = seconds
        return client
    set_client_factory(with_timeout)


class HubError(RuntimeError):
    """The Hub cannot be used as asked; says what to do.

    Attributes:
        is_temporary: Whether the same may work later.
        retry_after: Seconds to wait before that, as far as the Hub says.
        status: The Hub's HTTP status, None if there was no answer.
    """

    def __init__(self, text: str, *, is_temporary: bool = False, retry_after: float = 0, status: int | None = None):
        super().__init__(redact(text))
        self.is_temporary = is_temporary
        self.retry_after = retry_after
        self.status = status


def _log_in_hint() -> str:
    return f'Run `hf auth login`, or set HF_TOKEN, with a token that may write, from {_TOKENS_PAGE}'


def _causes(error: BaseException) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explained(error: Exception, what: str) -> HubError:
    """A library's error as a HubError: what was tried, why it failed, what to do."""
    answer = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
    if answer is None:
        permanent = isinstance(error, (*_PERMANENT_ERRORS, OfflineModeIsEnabled))
        where = '' if permanent else f'no connection to {constants.ENDPOINT}: '
        return HubError(f'{what}: {where}{error or type(error).__name__}', is_temporary=not permanent)
    status = answer.response.status_code
    said = ' '.join((answer.server_message or '').split())
    said = f' The Hub says: {said.rstrip(".")}.' if said else ''
    if status == 401 and not isinstance(answer, RepositoryNotFoundError):
        text = f'the token is not valid (any more). {_log_in_hint()}.'
    elif status in (401, 404):
        text = 'the Hub has no such repository or revision, or the token may not see it.'
    elif status == 403:
        text = (f'the token may not do this. Make one that may write to this repository, at {_TOKENS_PAGE}, and log in '
                'with it, or take a name in a namespace of yours.')
    elif status == 429:
        text = 'too many requests for the Hub at the moment (429).'
    elif status in _CONFLICT:
        text = f'somebody else changed the repository at the same time ({status}).'
    else:
        text = f'the Hub answered {status}.'
    wait = answer.response.headers.get('Retry-After', '')
    return HubError(
        f'{what}: {text}{said}', is_temporary=status in (*_TEMPORARY, *_CONFLICT),
        retry_after=min(float(wait), PATIENCE) if wait.isdigit() else 0, status=status)


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub into a HubError that starts with what was tried."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # of many kinds, and with other HTTP libraries from version to version
        _logger.debug('', exc_info=True)
        raise _explained(error, what) from None  # a traceback would show the text of the answer


def with_retries(
        push: Callable[[], T],
        waits: Sequence[float] = RETRY_WAITS,
        sleep: Callable[[float], Any] | None = None,
) -> T:
    """Call a function again after temporary errors, with increasing waits in between.

    Args:
        push: The function.
        waits: Seconds to wait after each failure. The Hub may ask for more.
        sleep: Function that waits, by default time.sleep.

    Raises:
        HubError: the last error, if all calls failed, the next call would begin more than 10 minutes after the first
            failure, or trying again cannot help.
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
            _logger.warning(f'{error} Trying again in {wait:g} s.')
            (sleep or time.sleep)(wait)
    raise AssertionError('unreachable')


class _Seen(NamedTuple):
    """What a repository holds at one commit."""
    commit: str
    files: dict[str, str]  # the content's SHA-256 for large files, git's hash for others


def _hashes(file: CommitOperationAdd) -> tuple[str, str]:
    """What _Seen may have of a file, if the repository holds it."""
    return file.upload_info.sha256.hex(), git_hash(Path(file.path_or_fileobj).read_bytes())


class HubRepository:
    """A model repository that a run pushes to.

    It is only ever changed by commits on top of a state that was looked at: one that holds another architecture, or
    weights that somebody else pushed in the meantime, is left alone unless forced.

    Args:
        repo_id: 'user/name', or 'name' for the user whom the token belongs to.
        revision: Branch to push to, made if it does not exist; None for main.
        private: Whether a repository that is made here is private; None for the namespace's default.
        force: Overwrite what is there, by a commit.

    Raises:
        HubError: if the name of the repository or of the branch is not one that the Hub takes.
    """

    def __init__(self, repo_id: str, *, revision: str | None = None, private: bool | None = None, force: bool = False):
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise HubError(f'{repo_id!r} cannot be a repository name. Give user/name. {error}') from None
        if contains_token(repo_id) or contains_token(revision or ''):
            raise HubError('The name of the repository or of the branch contains an access token.')
        if revision is not None and _NO_BRANCH.search(revision):
            raise HubError(
                f'{revision!r} cannot be the name of a branch. Take letters, digits and - _ . / between them.')
        self.repo_id = repo_id
        self.revision = revision
        self.private = private
        self.force = force
        self.api = HfApi(library_name='timm_multimix')
        self._known_weights: set[str | None] = set()

    @property
    def shown(self) -> str:
        """The repository as timm's create_model takes it, without `hf-hub:`."""
        return self.repo_id + (f'@{self.revision}' if self.revision else '')

    def log_in(self) -> None:
        """Check that there is a token, that it is valid, and that it may write.

        Raises:
            HubError: if not.
        """
        with _asking('Looking for a token'):
            token = get_token()
        if not token:
            raise HubError(f'There is no access token for the Hugging Face Hub. {_log_in_hint()}.')
        remember_token(token)
        with _asking('Logging in to the Hugging Face Hub'):
            user = self.api.whoami()
        role = ((user.get('auth') or {}).get('accessToken') or {}).get('role')
        if role == 'read':
            raise HubError(f"The access token of {user['name']} may only read. {_log_in_hint()}.")
        if '/' not in self.repo_id:
            self.repo_id = f'{user["name"]}/{self.repo_id}'

    def open(self, architecture: str) -> None:
        """Make the repository if there is none, and check that it may be written and is one for this architecture.

        Args:
            architecture: timm's name of the model.

        Raises:
            HubError: if not.
        """
        with _asking(f'Opening {self.repo_id}'):
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            self.api.auth_check(self.repo_id, write=True)
            if self.revision:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            seen = self._look()
            self._check_architecture(seen, architecture)
        self._known_weights = {seen.files.get(WEIGHTS_NAME)}

    def _look(self) -> _Seen:
        info = self.api.model_info(
            self.repo_id, revision=self.revision, files_metadata=True, timeout=_ANSWER_TIMEOUT)
        return _Seen(info.sha, {
            file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()})

    def _read(self, seen: _Seen, name: str) -> str | None:
        if name not in seen.files:
            return None
        try:
            path = self.api.hf_hub_download(self.repo_id, name, revision=seen.commit)
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding='utf-8')

    def _check_architecture(self, seen: _Seen, architecture: str) -> None:
        if self.force or not {CONFIG_NAME, WEIGHTS_NAME} & set(seen.files):
            return
        try:
            config = json.loads(self._read(seen, CONFIG_NAME) or '{}')
        except ValueError:
            config = {}
        there = config.get('architecture') if isinstance(config, dict) else None
        if there != architecture:
            raise HubError(
                f'{self.shown} holds {f"a {there}" if there else "a model that is not a timm model"}, and this is a '
                f'{architecture}. Choose another name, or overwrite it with a commit by --hub-force (push: --force).')

    def _check_weights(self, seen: _Seen, weights: str) -> None:
        there = seen.files.get(WEIGHTS_NAME)
        if self._known_weights and there not in self._known_weights | {weights} and not self.force:
            raise HubError(
                f'Somebody else pushed weights to {self.shown} in the meantime (commit {seen.commit[:7]}); they are '
                'left alone. Push to another name or revision, or overwrite them with a commit by --hub-force '
                '(push: --force).')

    def commit(self, folder: str | os.PathLike, message: str) -> str:
        """Push the files of a folder as one commit, on top of what was looked at right before.

        Args:
            folder: A model as `save_model` writes it. A card that somebody wrote by hand is kept.
            message: What the commit is.

        Returns:
            Address of the commit, or of the one that is there if it would change nothing.

        Raises:
            HubError: if it cannot be done; the repository is as it was.
        """
        folder = Path(folder)
        for attempt in range(_COMMIT_ATTEMPTS):
            try:
                with _asking(f'Pushing to {self.shown}'):
                    return self._commit(folder, message)
            except HubError as error:
                if error.status not in _CONFLICT or attempt == _COMMIT_ATTEMPTS - 1:
                    raise
        raise AssertionError('unreachable')

    def _commit(self, folder: Path, message: str) -> str:
        files = {path.name: CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())}
        weights = files[WEIGHTS_NAME].upload_info.sha256.hex()
        seen = self._look()
        self._check_architecture(seen, json.loads((folder / CONFIG_NAME).read_text())['architecture'])
        self._check_weights(seen, weights)
        # Ours from here on, even if the answer to the commit is lost.
        self._known_weights |= {weights, seen.files.get(WEIGHTS_NAME)}
        if CARD_NAME in files and not is_ours(self._read(seen, CARD_NAME)):
            _logger.info(f'{self.shown} has a card written by hand, which is kept.')
            del files[CARD_NAME]
        if all(seen.files.get(name) in _hashes(file) for name, file in files.items()):
            return f'{self.api.endpoint}/{self.repo_id}/commit/{seen.commit}'
        info = self.api.create_commit(
            self.repo_id,
            files.values(),
            commit_message=message,
            revision=self.revision,
            parent_commit=seen.commit,
        )
        return str(info.commit_url)


def is_hub_name(name: str) -> bool:
    """Whether a name says that something is on the Hub: `hf-hub:user/name`, and `@revision` if need be."""
    return name.lower().startswith(('hf-hub:', 'hf_hub:'))


def download(name: str, *filenames: str) -> str:
    """Download the first of some files that a model on the Hub has.

    Args:
        name: `hf-hub:user/name[@revision]`.
        *filenames: Names of files.

    Returns:
        Path of the file, in huggingface_hub's cache.

    Raises:
        HubError: if it has none of them, or cannot be reached.
    """
    for filename in filenames:
        with _asking('Downloading it'), suppress(EntryNotFoundError):
            return download_from_hf(name.partition(':')[2], filename)
    raise HubError(f'{name} has none of the files {", ".join(filenames)}.')
