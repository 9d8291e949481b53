"""Access tokens: which text contains one, and how it is shown without."""
import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants, get_token

_VARIABLES = ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_OIDC_ID_TOKEN')
_SHORTEST = 6  # characters of a token without a prefix; anything shorter could be a word of a message
_PREFIXED = r'((?:hf_(?:(?:oauth|jwt|refresh)_)*|api_org_))[A-Za-z0-9]{%d,}[\w-]*(?:\.[\w-]+)*=*'
_LIKELY = re.compile(_PREFIXED % 6)
_CERTAIN = re.compile(_PREFIXED % 20)  # not the name of a folder such as hf_checkpoints

_remembered: set[str] = set()


def remember_token(token: str) -> None:
    """Remember a token that is in use, for contains_token and redact."""
    _remembered.add(token)


def _known_tokens(ask: bool = False) -> list[str]:
    """Tokens that this process can know, the longest first, in plain text and as a part of a URL.

    Args:
        ask: Call get_token, which may use the network.
    """
    tokens = {*_remembered, *(os.environ.get(name, '') for name in _VARIABLES)}
    with suppress(OSError, UnicodeDecodeError):
        tokens.add(Path(constants.HF_TOKEN_PATH).read_text())
    if ask:
        with suppress(Exception):
            tokens.add(get_token() or '')
    tokens = {token.strip() for token in tokens if len(token.strip()) >= _SHORTEST}
    return sorted({*tokens, *(quote(token, safe='') for token in tokens)}, key=len, reverse=True)


def contains_token(text: str) -> bool:
    """Whether a text contains an access token: one that is known here, or one of the kinds that the Hub issues."""
    return _CERTAIN.search(text) is not None or any(token in text for token in _known_tokens())


def redact(text: str, *, only_certain: bool = False) -> str:
    """Replace access tokens in a text by `...`.

    Args:
        text: The text.
        only_certain: Leave what may be another name, such as hf_checkpoints, and do not ask the Hub for the token.
    """
    for token in _known_tokens(ask=not only_certain):
        prefix = _LIKELY.match(token)
        text = text.replace(token, f'{prefix.group(1) if prefix else ""}...')
    return (_CERTAIN if only_certain else _LIKELY).sub(r'\1...', text)
