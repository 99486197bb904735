"""State that other nodes may take over: the KV memory of a prompt's beginning."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from meshd_plugins.api.requests import Privacy


@dataclass(frozen=True, slots=True)
class WarmPrefix:
    """A prefix whose KV state a capability holds."""

    tag: bytes  # of the request that made it: its last one
    tokens: int  # that need not be computed again


@dataclass(frozen=True, slots=True)
class PrefixHead:
    """What is said of a state before its bytes: all of it is to be checked against them."""

    tag: bytes
    caller: str  # whose it is: only a request of the same one may use it
    privacy: Privacy  # the narrowest class of the requests that made it
    token_ids: bytes  # four bytes each, little endian
    size_bytes: int
    digest: bytes  # BLAKE2b-256 of the bytes

    @property
    def tokens(self) -> int:
        """How many tokens it is of."""
        return len(self.token_ids) // 4


class PrefixExport(Protocol):
    """A state on its way out."""

    @property
    def head(self) -> PrefixHead:
        """What it is."""
        ...

    async def receive(self) -> bytes | None:
        """The next bytes, at most 1 MiB; None after the last. Raises Failed."""
        ...


@runtime_checkable
class PrefixHolder(Protocol):
    """What a capability implements beside `Capability` whose KV state other nodes may take over.

    Its descriptor has a model with `kv_key` and `kv_bytes_per_token`. The daemon has checked who asks, and
    where the state would go, before it calls; what comes in is as long and has the digest that its head says
    only once the iteration has ended, so nothing is put to use before.
    """

    def warm(self) -> Sequence[WarmPrefix]:
        """What is held now, the most recently used first. Returns at once."""
        ...

    def export_prefix(
        self, tag: bytes, caller: str, away: Privacy
    ) -> AbstractAsyncContextManager[PrefixExport]:
        """Hand a state out to a node that is so far away.

        Raises:
            Refused: `not_warm`; `caller`: it is another's; `privacy`: its class is narrower; `busy`.
            Failed: it broke.
        """
        ...

    async def import_prefix(self, head: PrefixHead, data: AsyncIterable[bytes]) -> int:
        """Take a state in; the tokens that are warm by it now. What `data` raises is passed on.

        Raises:
            Refused: it is not wanted, or not what it says; nothing of it is kept.
            Failed: it broke; nothing of it is kept.
        """
        ...
