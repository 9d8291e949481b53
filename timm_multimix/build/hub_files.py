"""Download files of model repositories on the Hugging Face Hub, and report the errors of the Hub."""
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, download_from_hf

from ..common.secrets import redact

_logger = logging.getLogger(__name__)

CONFIG_NAME = 'config.json'
WEIGHTS_NAME = HF_SAFE_WEIGHTS_NAME
REQUEST_TIMEOUT = 90  # seconds; longer than the 60 seconds of the Hub's gateway
PATIENCE = 600  # seconds for all retries
TOKENS_PAGE = 'https://huggingface.co/settings/tokens'
CONFLICT = (409, 412)  # another commit was made first
_TEMPORARY = (408, 429, 500, 502, 503, 504)
# Errors for which a retry does not help. Other errors come from the network.
_PERMANENT_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, FileNotFoundError,
                     PermissionError)


class HubError(RuntimeError):
    """A failed operation on the Hugging Face Hub.

    Attributes:
        is_temporary: Whether a retry can succeed.
        retry_after: Seconds to wait before a retry, as requested by the Hub; 0 if it requests nothing.
        status: HTTP status of the response; None without a response.
    """

    def __init__(self, text: str, *, is_temporary: bool = False, retry_after: float = 0, status: int | None = None):
        super().__init__(redact(text))
        self.is_temporary = is_temporary
        self.retry_after = retry_after
        self.status = status


def log_in_hint() -> str:
    return f'Run `hf auth login` or set HF_TOKEN, with a token with write access from {TOKENS_PAGE}'


def _causes(error: BaseException) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _as_hub_error(error: Exception, operation: str) -> HubError:
    """Convert a library's error to a HubError with the operation, the cause and the remedy."""
    http_error = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
    if http_error is None:
        permanent = isinstance(error, (*_PERMANENT_ERRORS, OfflineModeIsEnabled))
        reason = '' if permanent else f'no connection to {constants.ENDPOINT}: '
        return HubError(f'{operation}: {reason}{error or type(error).__name__}', is_temporary=not permanent)
    status = http_error.response.status_code
    message = ' '.join((http_error.server_message or '').split())
    message = f' Response of the Hub: {message.rstrip(".")}.' if message else ''
    if status == 401 and not isinstance(http_error, RepositoryNotFoundError):
        text = f'the token is not valid or has expired. {log_in_hint()}.'
    elif status in (401, 404):
        text = 'there is no such repository or revision, or the token cannot read it.'
    elif status == 403:
        text = ('the token does not permit this. Create a token with write access to this repository at '
                f'{TOKENS_PAGE} and log in with it, or choose a repository in your own namespace.')
    elif status == 429:
        text = 'too many requests (429).'
    elif status in CONFLICT:
        text = f'the repository was changed by another commit at the same time ({status}).'
    else:
        text = f'the Hub responded with status {status}.'
    wait = http_error.response.headers.get('Retry-After', '')
    return HubError(
        f'{operation}: {text}{message}', is_temporary=status in (*_TEMPORARY, *CONFLICT),
        retry_after=min(float(wait), PATIENCE) if wait.isdigit() else 0, status=status)


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
    """Download the first file that exists in a model repository.

    Args:
        name: `hf-hub:user/name[@revision]`.
        *filenames: File names in order of preference.

    Returns:
        Path of the file in huggingface_hub's cache.

    Raises:
        HubError: if the repository has none of the files or cannot be read.
    """
    for filename in filenames:
        with hub_errors('Downloading from the Hub'), suppress(EntryNotFoundError):
            return download_from_hf(name.partition(':')[2], filename)
    raise HubError(f'{name} has none of the files {", ".join(filenames)}.')
