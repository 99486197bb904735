"""What one node asks another about itself, for people: its clock, its release, what it holds.

These calls travel on the peer streams beside the calls of capabilities, under an id that no capability can
have. Every daemon answers them to every member of its mesh: they change nothing and tell nothing that gossip
does not tell. Both sides bound them: calls at once and lines of an answer here, time and lines there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from meshd.core.effects import Address
from meshd.health import PeerAnswer
from meshd.orchestrate.decoding import Malformed, count, mapping, number, sequence, text, typed
from meshd.shell.streams import (
    CallHeader,
    IncomingCall,
    OutgoingCall,
    PeerStreams,
    PeerUnreachable,
    RemoteFailed,
    RemoteRefused,
    StreamError,
)
from meshd_cms import DigestLine, Epoch, NodeId, Store, Version
from meshd_plugins.api import BadRequest, Failed, Refused, Value

INSPECTION_ID: Final = "meshd/inspection"  # a capability's id is NAME#DIGEST
INSPECTION_S: Final = 5.0
SERVED_MAX: Final = 16  # at once; one costs less than a millisecond
LINES_PER_CHUNK: Final = 256
LINES_MAX: Final = 4_096  # of one answer that are read; a store holds half of that
TEXT_CHARS_MAX: Final = 64  # of a peer's text that is shown
CLOCK_TRIES: Final = 2  # the first call may have to dial, which says nothing about the way

_ABOUT: Final = "about"
_STORE: Final = "store"
_CLOCK, _SOFTWARE, _PROTOCOL, _UP, _HEARD, _COUNT = "t", "s", "p", "u", "h", "n"


def is_inspection(call: IncomingCall) -> bool:
    """Whether a call is one of these, and no capability's."""
    return call.header.capability_id == INSPECTION_ID


@dataclass(frozen=True, slots=True)
class SelfDescription:
    """What this node says of itself.

    Attributes:
        software: release, such as `meshd 0.1.0`.
        protocol: version of the peer protocol.
        unix_s: the wall clock now.
        up_s: seconds since the start.
        heard_ago_s: seconds since the last datagram of a node, None when there was none.
    """

    software: str
    protocol: int
    unix_s: Callable[[], float]
    up_s: Callable[[], float]
    heard_ago_s: Callable[[NodeId], float | None]


class InspectionServer:
    """Answers the questions of peers.

    Args:
        about: what is said of this node.
        store: read only.
    """

    def __init__(self, about: SelfDescription, store: Store) -> None:
        self._about = about
        self._store = store
        self._running = 0

    async def serve(self, call: IncomingCall) -> Value:
        """Answer one call; returns its trailer.

        Raises:
            Refused: `busy`.
            BadRequest: `unknown_inspection`.
        """
        if self._running >= SERVED_MAX:
            raise Refused("too many questions at once", code="busy")
        self._running += 1
        try:
            match call.header.operation:
                case "about":
                    return self._described(call.peer)
                case "store":
                    return await self._lines(call)
                case _:
                    raise BadRequest("this node knows no such question", code="unknown_inspection")
        finally:
            self._running -= 1

    def _described(self, caller: NodeId) -> Value:
        about = self._about
        return {
            _CLOCK: about.unix_s(),
            _SOFTWARE: about.software,
            _PROTOCOL: about.protocol,
            _UP: about.up_s(),
            _HEARD: about.heard_ago_s(caller),
        }

    async def _lines(self, call: IncomingCall) -> Value:
        lines = own_lines(self._store)
        for start in range(0, len(lines), LINES_PER_CHUNK):
            await call.send(
                [
                    [line.owner, line.epoch, line.max_version, line.floor]
                    for line in lines[start : start + LINES_PER_CHUNK]
                ]
            )
        return {_COUNT: len(lines)}


def own_lines(store: Store) -> tuple[DigestLine, ...]:
    """What this store reads of every owner, by owner."""
    return tuple(line for owner in store.owners() if (line := store.line(owner)) is not None)


class Inspector:
    """Asks peers.

    Args:
        me: this node.
        streams: to the peers.
        unix_s: the wall clock.
        deadline_s: of one call, dialling included.
    """

    def __init__(
        self,
        me: NodeId,
        streams: PeerStreams,
        unix_s: Callable[[], float],
        *,
        deadline_s: float = INSPECTION_S,
    ) -> None:
        self._me = me
        self._streams = streams
        self._unix_s = unix_s
        self._deadline_s = deadline_s

    async def about(self, node: NodeId, address: Address) -> PeerAnswer:
        """Ask who it is and what its clock shows; never raises for what the peer or the network does."""
        best: PeerAnswer | None = None
        try:
            for _ in range(CLOCK_TRIES):
                answer = await self._about(node, address)
                if best is None or answer.clock_error_s < best.clock_error_s:
                    best = answer
        except Failed as error:
            return best or PeerAnswer(error=error.message)
        assert best is not None
        return best

    async def lines(self, node: NodeId, address: Address) -> tuple[DigestLine, ...]:
        """What a peer holds of every owner.

        Raises:
            Failed: `unreachable`, `deadline_exceeded`, `stream_lost`, `peer_fault`, or as the peer says.
        """
        parts, trailer = await self._ask(node, address, _STORE)
        try:
            lines = [_line(each) for part in parts for each in sequence(part, "lines")]
            if len(lines) != count(mapping(trailer, "trailer").get(_COUNT), "count"):
                raise Malformed("lines: another number than it says")
        except Malformed as error:
            raise Failed(f"the peer's answer is malformed: {error}", code="peer_fault") from error
        return tuple(lines)

    async def _about(self, node: NodeId, address: Address) -> PeerAnswer:
        asked_s, asked_unix_s = trio.current_time(), self._unix_s()
        _, trailer = await self._ask(node, address, _ABOUT)
        took_s = trio.current_time() - asked_s
        try:
            table = mapping(trailer, "answer")
            clock_s = number(table.get(_CLOCK), "clock")
            heard = table.get(_HEARD)
            return PeerAnswer(
                clock_ahead_s=clock_s - (asked_unix_s + took_s / 2),
                clock_error_s=took_s / 2,
                software=text(table.get(_SOFTWARE, ""), "software")[:TEXT_CHARS_MAX],
                protocol=count(table.get(_PROTOCOL), "protocol"),
                heard_us_ago_s=None if heard is None else number(heard, "heard"),
                up_s=number(table.get(_UP), "up"),
            )
        except Malformed as error:
            raise Failed(f"the peer's answer is malformed: {error}", code="peer_fault") from error

    async def _ask(
        self, node: NodeId, address: Address, question: str
    ) -> tuple[Sequence[Value], Value]:
        header = CallHeader(
            request_id=secrets.token_hex(8),
            name="",
            capability_id=INSPECTION_ID,
            operation=question,
            caller=self._me,
            remaining_s=self._deadline_s,
        )
        try:
            with trio.fail_after(self._deadline_s):
                async with self._streams.call(node, address, header, {}) as call:
                    return await _whole(call), call.trailer
        except trio.TooSlowError:
            message = f"no answer within {self._deadline_s:g} s"
            raise Failed(message, code="deadline_exceeded") from None
        except PeerUnreachable as error:
            raise Failed(error.message, code=PeerUnreachable.code) from error
        except (RemoteRefused, RemoteFailed) as error:
            raise Failed(error.message, code=error.code) from error
        except StreamError as error:
            raise Failed(error.message, code="stream_lost") from error


async def _whole(call: OutgoingCall) -> Sequence[Value]:
    parts: list[Value] = []
    lines = 0
    while (part := await call.receive()) is not None:
        lines += len(part) if isinstance(part, Sequence | Mapping) else 1
        if lines > LINES_MAX:
            raise Failed(f"the peer's answer has over {LINES_MAX} lines", code="peer_fault")
        parts.append(part)
    return parts


def _line(value: Value) -> DigestLine:
    fields = sequence(value, "line")
    if len(fields) != 4:
        raise Malformed("line: expected an owner and three counters")
    owner = typed(fields[0], bytes, "owner")
    if len(owner) != 16:
        raise Malformed("owner: expected 16 bytes")
    epoch, version, floor = (count(each, "line") for each in fields[1:])
    return DigestLine(NodeId(owner), Epoch(epoch), Version(version), Version(floor))
