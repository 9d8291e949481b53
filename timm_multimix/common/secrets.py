"""Detect and redact access tokens in text."""
import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

_VARIABLES = ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_OIDC_ID_TOKEN')
_SHORTEST = 6  # characters of a token; a shorter one could be a word of a message
_PREFIXED = r'((?:hf_(?:(?:oauth|jwt|refresh)_)*|api_org_))[A-Za-z0-9]{%d,}[\w-]*(?:\.[\w-]+)*=*'
_LIKELY = re.compile(_PREFIXED % 6)
_CERTAIN = re.compile(_PREFIXED % 20)  # does not match folder names such as hf_checkpoints

_remembered: set[str] = set()


def remember_token(token: str) -> None:
    """Register a token for contains_token and redact."""
    _remembered.add(token)


def _known_tokens(call_get_token: bool = False) -> list[str]:
    """Tokens that are available to this process, in plain text and quoted for URLs, longest first.

    Args:
        call_get_token: Call get_token, which can use the network.
    """
    from huggingface_hub import constants, get_token  # slow to import

    tokens = {*_remembered, *(os.environ.get(name, '') for name in _VARIABLES)}
    with suppress(OSError, UnicodeDecodeError):
        tokens.add(Path(constants.HF_TOKEN_PATH).read_text())
    if call_get_token:
        with suppress(Exception):
            tokens.add(get_token() or '')
    tokens = {token.strip() for token in tokens if len(token.strip()) >= _SHORTEST}
    return sorted({*tokens, *(quote(token, safe='') for token in tokens)}, key=len, reverse=True)


def contains_token(text: str) -> bool:
    """Return whether a text contains an access token: one of this process, or any in the format of the Hub."""
    return _CERTAIN.search(text) is not None or any(token in text for token in _known_tokens())


def redact(text: str, *, only_certain: bool = False) -> str:
    """Replace access tokens in a text by `...`.

    Args:
        text: The text.
        only_certain: Do not replace text that can be another name, such as hf_checkpoints, and do not call get_token.
    """
    for token in _known_tokens(call_get_token=not only_certain):
        prefix = _LIKELY.match(token)
        text = text.replace(token, f'{prefix.group(1) if prefix else ""}...')
    return (_CERTAIN if only_certain else _LIKELY).sub(r'\1...', text)
