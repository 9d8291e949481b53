"""Download files of model repositories on the Hugging Face Hub, and report the errors of the Hub."""
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from ..common.errors import causes
from ..common.secrets import redact

_logger = logging.getLogger(__name__)

CONFIG_NAME = constants.CONFIG_NAME
WEIGHTS_NAME = constants.SAFETENSORS_SINGLE_FILE
PICKLED_WEIGHTS_NAME = constants.PYTORCH_WEIGHTS_NAME
PATIENCE = 600  # seconds to wait at most for the Hub
TOKENS_PAGE = 'https://huggingface.co/settings/tokens'
_CONFLICT = (409, 412)  # another commit was made first
_TEMPORARY = (408, 429, 500, 502, 503, 504, *_CONFLICT)
# Errors for which a retry does not help. Other errors come from the network.
_PERMANENT_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, FileNotFoundError,
                     PermissionError, OfflineModeIsEnabled)


class HubError(RuntimeError):
    """A failed operation on the Hugging Face Hub.

    Attributes:
        is_temporary: Whether a retry can succeed.
        retry_after: Seconds to wait before a retry, as requested by the Hub; 0 if it requests nothing.
    """

    def __init__(self, text: str, *, is_temporary: bool = False, retry_after: float = 0):
        super().__init__(redact(text))
        self.is_temporary = is_temporary
        self.retry_after = retry_after


def log_in_hint() -> str:
    return f'Run `hf auth login` or set HF_TOKEN, with a token with write access from {TOKENS_PAGE}'


def _explain(error: HfHubHTTPError) -> str:
    """Return the cause of an HTTP error and its remedy."""
    status = error.response.status_code
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f'the token is not valid or has expired. {log_in_hint()}.'
    if status in (401, 404):
        return 'there is no such repository or revision, or the token cannot read it.'
    if status == 403:
        return ('the token does not permit this. Create a token with write access to this repository at '
                f'{TOKENS_PAGE} and log in with it, or choose a repository in your own namespace.')
    reasons = {429: 'too many requests', **dict.fromkeys(_CONFLICT, 'another commit changed the repository meanwhile')}
    return f'{reasons.get(status, "the request failed")} (status {status}).'


def _as_hub_error(error: Exception, operation: str) -> HubError:
    """Convert a library's error to a HubError with the operation, the cause and the remedy."""
    http_error = next((cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)
    if http_error is None:
        # huggingface_hub raises LocalEntryNotFoundError for a download without a connection.
        is_permanent = isinstance(error, _PERMANENT_ERRORS) and not isinstance(error, LocalEntryNotFoundError)
        reason = '' if is_permanent else f'no connection to {constants.ENDPOINT}: '
        return HubError(f'{operation}: {reason}{error or type(error).__name__}', is_temporary=not is_permanent)
    status, wait = http_error.response.status_code, http_error.response.headers.get('Retry-After', '')
    message = ' '.join((http_error.server_message or '').split()).rstrip('.')
    return HubError(
        f'{operation}: {_explain(http_error)}{f" Response of the Hub: {message}." if message else ""}',
        is_temporary=status in _TEMPORARY, retry_after=min(float(wait), PATIENCE) if wait.isdigit() else 0)


@contextmanager
def hub_errors(operation: str) -> Iterator[None]:
    """Convert exceptions to a HubError whose message starts with the operation."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the types depend on the HTTP library, which differs between versions
        _logger.debug('', exc_info=True)
        raise _as_hub_error(error, operation) from None  # a traceback would contain the text of the response


def is_hub_name(name: str) -> bool:
    """Return whether a name refers to the Hub: `hf-hub:user/name` or `hf-hub:user/name@revision`."""
    return name.lower().startswith(('hf-hub:', 'hf_hub:'))


def download(name: str, *filenames: str) -> str:
    """Download the first of these files that the repository `hf-hub:user/name[@revision]` has. Return its path."""
    repo_id, _, revision = name.partition(':')[2].partition('@')
    for filename in filenames:
        with hub_errors('Downloading from the Hub'), suppress(RemoteEntryNotFoundError):
            return hf_hub_download(repo_id, filename, revision=revision or None)
    raise HubError(f'{name} has none of the files {", ".join(filenames)}.')
