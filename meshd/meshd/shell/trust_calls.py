"""The calls about certificates and keys between daemons, both ends, to `meshd/trust`.

    renew   {}                          -> {"c": [certificate, ...]}     the chain, DER, its own first
    appoint {"c": [certificate, ...], "a": [certificate, ...]} -> {}     be an issuer: the chain, the authority
    sync    {"d": [id, ...], "k": [commitment, ...]}
            -> chunks [decree, ...], then {"k": [key, ...], "b": bool}   "b": the callee lacks some of the ids

`renew` is served to whoever has a key that was let in and is not revoked, the others to members in good standing.
An appointment proves itself: whoever brings it, an issuer has signed it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeGuard

import trio

from meshd.core.decrees import COMMITMENT_BYTES, DECREE_BYTES_MAX, DECREE_ID_BYTES, DECREES_MAX
from meshd.core.effects import Address
from meshd.core.frames import CallHeader
from meshd.shell.gate import RENEW, TRUST_ID
from meshd.shell.stream_calls import IncomingCall, OutgoingCall
from meshd.shell.stream_errors import PeerUnreachable
from meshd.shell.streams import PeerStreams
from meshd.trust.certificates import CHAIN_MAX
from meshd.trust.tls import PeerProof
from meshd_cms.types import NodeId, Value
from meshd_plugins.api import BadRequest, Failed, Refused

SYNC: Final = "sync"
APPOINT: Final = "appoint"
CALL_S: Final = 5.0
SERVED_MAX: Final = 16  # at once
KEYS_MAX: Final = 4  # asked for at once
DECREES_PER_CHUNK: Final = 64

_CHAIN, _AUTHORITY, _DECREES, _KEYS, _BEHIND = "c", "a", "d", "k", "b"


@dataclass(frozen=True, slots=True)
class Synced:
    """What a peer had that we lack."""

    decrees: tuple[bytes, ...]
    keys: tuple[bytes, ...]


class Keeper(Protocol):
    """What the server of these calls asks of the node."""

    def renewed(self, proof: PeerProof) -> Sequence[bytes]:
        """A new chain for a peer, DER. Raises Refused: with why not, and what to do."""
        ...

    def appointed(
        self, proof: PeerProof, chain: Sequence[bytes], authority: Sequence[bytes]
    ) -> None:
        """A peer makes this node an issuer, with chains in DER. Raises Refused: they are not for this node."""
        ...

    def lacking(self, ids: Sequence[bytes]) -> tuple[Sequence[bytes], bool]:
        """The decrees held here that are not among these, and whether some of these are not here."""
        ...

    def keys(self, commitments: Sequence[bytes]) -> Sequence[bytes]:
        """Those of the keys with these commitments that are held here."""
        ...

    def behind(self, peer: NodeId) -> None:
        """A peer has decrees that are not here."""
        ...


def is_trust(call: IncomingCall) -> bool:
    """Whether a call is one of these."""
    return call.header.capability_id == TRUST_ID


class TrustServer:
    """Serves these calls."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._running = 0

    async def serve(self, call: IncomingCall) -> Value:
        """Answer one call; returns its trailer.

        Raises:
            Refused: `busy`, or as the keeper says.
            BadRequest: `unknown_call`, `malformed_call`.
        """
        if self._running >= SERVED_MAX:
            raise Refused("too many such calls at once", code="busy")
        self._running += 1
        try:
            match call.header.operation:
                case "renew":
                    return {_CHAIN: list(self._keeper.renewed(call.proof))}
                case "sync":
                    return await self._sync(call)
                case "appoint":
                    return self._appoint(call)
                case _:
                    raise BadRequest("this node knows no such call", code="unknown_call")
        finally:
            self._running -= 1

    def _appoint(self, call: IncomingCall) -> Value:
        body = call.body
        if not isinstance(body, Mapping):
            raise _malformed()
        chain = _octets(body.get(_CHAIN), CHAIN_MAX, None)
        authority = _octets(body.get(_AUTHORITY), CHAIN_MAX, None)
        if not chain or not authority:
            raise _malformed()
        self._keeper.appointed(call.proof, chain, authority)
        return {}

    async def _sync(self, call: IncomingCall) -> Value:
        body = call.body
        if not isinstance(body, Mapping):
            raise _malformed()
        ids = _octets(body.get(_DECREES), DECREES_MAX, DECREE_ID_BYTES)
        commitments = _octets(body.get(_KEYS), KEYS_MAX, COMMITMENT_BYTES)
        if ids is None or commitments is None:
            raise _malformed()
        raws, behind = self._keeper.lacking(ids)
        for start in range(0, len(raws), DECREES_PER_CHUNK):
            await call.send(list(raws[start : start + DECREES_PER_CHUNK]))
        if behind:
            self._keeper.behind(call.peer)
        return {_KEYS: list(self._keeper.keys(commitments)), _BEHIND: behind}


class TrustClient:
    """Makes these calls."""

    def __init__(self, streams: PeerStreams) -> None:
        self._streams = streams

    async def renew(self, node: NodeId | None, address: Address) -> Sequence[bytes]:
        """A new chain from an issuer, DER; nothing about it was checked.

        Raises:
            StreamError: as the peer or the network says.
            Failed: `peer_fault`: it said what makes no sense.
        """
        _, trailer = await self._ask(node, address, RENEW, {})
        chain = _octets(trailer.get(_CHAIN), CHAIN_MAX, None)
        if not chain:
            raise _nonsense()
        return chain

    async def appoint(
        self,
        node: NodeId,
        address: Address,
        chain: Sequence[bytes],
        authority: Sequence[bytes],
    ) -> None:
        """Make a peer an issuer.

        Raises: as `renew`.
        """
        body: dict[str, Value] = {_CHAIN: list(chain), _AUTHORITY: list(authority)}
        await self._ask(node, address, APPOINT, body)

    async def sync(
        self,
        node: NodeId | None,
        address: Address,
        ids: Sequence[bytes],
        commitments: Sequence[bytes],
    ) -> Synced:
        """What a peer holds beyond these decrees, and the keys that we ask for; nothing of it was checked.

        Raises: as `renew`.
        """
        body: dict[str, Value] = {_DECREES: list(ids), _KEYS: list(commitments)}
        chunks, trailer = await self._ask(node, address, SYNC, body)
        raws: list[bytes] = []
        for chunk in chunks:
            some = _octets(chunk, DECREES_PER_CHUNK, None)
            if some is None or any(len(each) > DECREE_BYTES_MAX for each in some):
                raise _nonsense()
            raws += some
        keys = _octets(trailer.get(_KEYS), KEYS_MAX, None)
        if keys is None:
            raise _nonsense()
        return Synced(tuple(raws), tuple(keys))

    async def _ask(
        self, node: NodeId | None, address: Address, operation: str, body: Value
    ) -> tuple[list[Value], Mapping[str, Value]]:
        header = CallHeader(
            request_id=secrets.token_hex(8),
            name="",
            capability_id=TRUST_ID,
            operation=operation,
            remaining_s=CALL_S,
        )
        try:
            with trio.fail_after(CALL_S):
                async with self._streams.call(node, address, header, body) as call:
                    chunks = await _all(call)
                    trailer = call.trailer
        except trio.TooSlowError:
            raise PeerUnreachable(f"no answer within {CALL_S:g} s") from None
        if not isinstance(trailer, Mapping):
            raise _nonsense()
        return chunks, trailer


async def _all(call: OutgoingCall) -> list[Value]:
    chunks: list[Value] = []
    while (chunk := await call.receive()) is not None:
        if len(chunks) > DECREES_MAX // DECREES_PER_CHUNK:
            raise _nonsense()
        chunks.append(chunk)
    return chunks


def _octets(value: Value, count_max: int, length: int | None) -> list[bytes] | None:
    """`value` if it is so many byte strings (of this length), None otherwise."""
    if not isinstance(value, list) or len(value) > count_max or not _are_bytes(value):
        return None
    return value if length is None or all(len(each) == length for each in value) else None


def _are_bytes(values: list[Value]) -> TypeGuard[list[bytes]]:
    return all(isinstance(each, bytes) for each in values)


def _malformed() -> BadRequest:
    return BadRequest("the call is malformed", code="malformed_call")


def _nonsense() -> Failed:
    return Failed("the peer's answer makes no sense", code="peer_fault")
