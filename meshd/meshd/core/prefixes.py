"""Tags: how nodes speak of a conversation's beginning without its text, or anything made from it alone.

A tag is a keyed hash under a secret that only the node where the request entered has, and only for this life
of its process. So whoever serves, relays or overhears can tell that two requests of one caller begin alike,
which whoever serves them sees anyhow, and nothing else: without the secret nobody can try texts.

Invariant: equal tags mean the same entry node and life of it, the same caller, the same kind of KV state, and the
same messages up to there. Who asks and which state are hashed in, so a tag of one caller or model is never that
of another. A wrong match (8 bytes; 4 in what is gossiped) costs a detour, never a wrong answer: state is reused
only as far as its own tokens are those of the prompt.

So of an image or a sound, which may have millions of characters, only `SAMPLE` at equal distances are hashed, with
its length and its end, where a PNG has its checksum. Compressed files that differ do so nearly everywhere; and to hash
all of a photo would take longer than anything else that is done to it where a request enters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Final

from meshd_cms import StoreError
from meshd_cms.entries import pack_value
from meshd_plugins.api import Operation, Value
from meshd_plugins.media import is_medium

TAG_BYTES: Final = 8
TAGS_MAX: Final = 8
"""Of one request: its last prefixes. A client that takes back more messages than that begins anew."""
SECRET_BYTES: Final = 32
WARM_MAX: Final = 16
"""Prefixes that a node tells the others of; each takes 6 bytes of its load."""
TOKENS_STEP: Final = 16
"""Tokens of a prefix are told in steps of so many, rounded down."""

SAMPLE: Final = 1 << 16
"""Characters of an image or a sound that are hashed; of a shorter one all."""

_END: Final = 64  # characters
_TOLD_TAG_BYTES: Final = 4
_TOLD_BYTES: Final = _TOLD_TAG_BYTES + 2
_STEPS_MAX: Final = 2**16 - 1


class Conversation:
    """The beginnings of one request, as they are hashed here."""

    def __init__(self, secret: bytes, chain: Sequence[bytes]) -> None:
        self._secret = secret
        self._chain = tuple(chain)
        self._tags: dict[str, tuple[bytes, ...]] = {}

    def tags(self, kv_key: str) -> tuple[bytes, ...]:
        """Those of its last prefixes, the shortest first, for one kind of KV state; the last is of it all."""
        tags = self._tags.get(kv_key)
        if tags is None:
            salt = kv_key.encode()
            tags = tuple(
                blake2b(link + salt, key=self._secret, digest_size=TAG_BYTES).digest()
                for link in self._chain
            )
            self._tags[kv_key] = tags
        return tags


class Tagger:
    """Makes the tags of one node.

    Args:
        secret: `SECRET_BYTES` of this life of the process, told to nobody and never stored.
    """

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == SECRET_BYTES
        self._secret = secret

    def conversation(
        self, caller: str, operation: Operation, body: Mapping[str, Value]
    ) -> Conversation:
        """What a request begins with; without any prefix where that means nothing or makes no sense."""
        match operation:
            case Operation.CHAT:
                found = body.get("messages")
                pieces = found if isinstance(found, list | tuple) else ()
            case Operation.COMPLETE:
                prompt = body.get("prompt")
                pieces = (prompt,) if isinstance(prompt, str) else ()
            case _:
                pieces = ()
        try:
            packed = [pack_value(_sampled(piece)) for piece in pieces]
            before = pack_value([caller, operation.value, body.get("tools")])
        except StoreError:
            packed, before = [], b""
        return Conversation(self._secret, self._links(before, packed))

    def _links(self, before: bytes, pieces: Sequence[bytes]) -> list[bytes]:
        running = blake2b(before, key=self._secret, digest_size=32)
        links: list[bytes] = []
        for number, piece in enumerate(pieces):
            running.update(len(piece).to_bytes(8, "big") + piece)
            if number >= len(pieces) - TAGS_MAX:
                links.append(running.digest())
        return links


def _sampled(message: Value) -> Value:
    """A message with samples in the place of long images and sounds."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(content, list | tuple):
        return message
    return {**message, "content": [_sampled_part(part) for part in content]}


def _sampled_part(part: Value) -> Value:
    if not isinstance(part, Mapping) or not is_medium(part):
        return part
    kind = str(part["type"])
    inner = part.get(kind)
    if not isinstance(inner, Mapping):
        return part
    return {**part, kind: {name: _sample(value) for name, value in inner.items()}}


def _sample(value: Value) -> Value:
    if not isinstance(value, str) or len(value) <= SAMPLE:
        return value
    step = -(-len(value) // SAMPLE)  # rounded up
    return [len(value), value[::step], value[-_END:]]


def pack_tags(tags: Sequence[bytes]) -> bytes:
    """As they travel with a request."""
    return b"".join(tags)


def unpack_tags(packed: bytes) -> tuple[bytes, ...]:
    """Read them. Raises ValueError: too many, or not whole."""
    if len(packed) % TAG_BYTES or len(packed) > TAGS_MAX * TAG_BYTES:
        raise ValueError(f"{len(packed)} bytes are no tags of a request")
    return tuple(packed[at : at + TAG_BYTES] for at in range(0, len(packed), TAG_BYTES))


def pack_warm(prefixes: Sequence[tuple[bytes, int]]) -> bytes:
    """What a node tells of its warm prefixes: of each the beginning of its tag, and its tokens.

    Args:
        prefixes: tags with tokens, the most recently used first; those beyond `WARM_MAX` are left out.
    """
    return b"".join(
        tag[:_TOLD_TAG_BYTES] + min(_STEPS_MAX, tokens // TOKENS_STEP).to_bytes(2, "big")
        for tag, tokens in prefixes[:WARM_MAX]
    )


class Warm:
    """What another node told of its warm prefixes."""

    def __init__(self, told: Mapping[bytes, int]) -> None:
        self._told = told

    def tokens(self, tag: bytes) -> int:
        """Tokens of a prefix that are warm there; 0 when it told nothing of it."""
        return self._told.get(tag[:_TOLD_TAG_BYTES], 0)

    @property
    def is_full(self) -> bool:
        """Whether there may be more than it told of."""
        return len(self._told) >= WARM_MAX

    @property
    def count(self) -> int:
        """Prefixes that it told of."""
        return len(self._told)


def unpack_warm(packed: Value) -> Warm | None:
    """Read what another node tells; None when it tells nothing, or what makes no sense."""
    if not isinstance(packed, bytes) or len(packed) % _TOLD_BYTES:
        return None
    if len(packed) > WARM_MAX * _TOLD_BYTES:
        return None
    told: dict[bytes, int] = {}
    for at in range(0, len(packed), _TOLD_BYTES):
        tag = packed[at : at + _TOLD_TAG_BYTES]
        steps = int.from_bytes(packed[at + _TOLD_TAG_BYTES : at + _TOLD_BYTES], "big")
        told[tag] = max(told.get(tag, 0), steps * TOKENS_STEP)
    return Warm(told)
