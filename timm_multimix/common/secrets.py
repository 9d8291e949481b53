"""Detect and redact access tokens in text."""
import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

_VARIABLES = ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_OIDC_ID_TOKEN')
_SHORTEST = 6  # characters of a token; a shorter one could be a word of a message
# Format of the Hub's tokens. The length excludes folder names such as hf_checkpoints.
_FORMAT = re.compile(r'((?:hf_(?:(?:oauth|jwt|refresh)_)*|api_org_))[A-Za-z0-9]{20,}[\w-]*(?:\.[\w-]+)*=*')


def _known_tokens() -> list[str]:
    """Tokens of this process, in plain text and quoted for URLs, longest first."""
    from huggingface_hub import constants  # slow to import

    tokens = {os.environ.get(name, '') for name in _VARIABLES}
    with suppress(OSError, UnicodeDecodeError):
        tokens.add(Path(constants.HF_TOKEN_PATH).read_text())
    tokens = {token.strip() for token in tokens if len(token.strip()) >= _SHORTEST}
    return sorted({*tokens, *(quote(token, safe='') for token in tokens)}, key=len, reverse=True)


def contains_token(text: str) -> bool:
    """Return whether a text contains an access token: one of this process, or any in the format of the Hub."""
    return _FORMAT.search(text) is not None or any(token in text for token in _known_tokens())


def redact(text: str) -> str:
    """Replace access tokens in a text by `...`."""
    for token in _known_tokens():
        text = text.replace(token, '...')
    return _FORMAT.sub(r'\1...', text)
