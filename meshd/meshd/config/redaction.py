"""Which names stand for something that must not be shown or logged."""

from __future__ import annotations

import itertools
import re
from functools import lru_cache

REDACTED = "[redacted]"

_SECRET_WORDS = frozenset(
    {"apikey", "authorization", "cookie", "credential", "credentials", "passphrase", "passwd", "password", "secret",
     "secrets", "token"}
)  # fmt: skip
_SECRET_KEYS = frozenset(
    {"access", "api", "auth", "datagram", "mesh", "private", "root", "secret", "shared", "signing"}
)
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_URL_USER = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@lru_cache(maxsize=512)  # asked for every field of every log line
def is_secret_name(name: str) -> bool:
    """Whether a value of this name is a secret: `api_key`, `hf_token`, `X-Auth-Token`, `rootKey`.

    Counts are not: `tokens`, `tokens_per_s`, `key` alone and `kv_key` stay readable.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if _SECRET_WORDS.intersection(words):
        return True
    return any(
        word == "key" and before in _SECRET_KEYS for before, word in itertools.pairwise(words)
    )


def without_url_user(text: str) -> str:
    """The text with `user:password@` of URLs taken out."""
    return _URL_USER.sub(REDACTED, text) if "://" in text else text
