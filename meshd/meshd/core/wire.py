"""The messages of the gossip protocol, and their codec.

A payload is one msgpack array: the protocol number, then messages, each an array that starts with its
kind. Decoding is strict and whole: a payload of which any part is malformed is no payload, and nothing of
it is acted upon. Decoders raise `CodecError` and nothing else.

Numbers are never reused. A message a later protocol adds gets a new kind; this one refuses kinds it does
not know, because a half-understood datagram cannot be repaired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, assert_never, cast

from meshd.core.effects import Address
from meshd.core.membership import STATE_HASH_BYTES, STATES, MemberState, Update
from meshd_cms.codec import (
    pack_delta,
    pack_digest,
    pack_soft,
    unpack_delta,
    unpack_digest,
    unpack_soft,
)
from meshd_cms.errors import CodecError
from meshd_cms.packing import pack, unpack
from meshd_cms.soft import SoftItem
from meshd_cms.types import COUNTER_MAX, NODE_ID_BYTES, Delta, DigestLine, Epoch, NodeId, Version

PROTOCOL: Final = 1
MESSAGES_MAX: Final = 4096  # in one payload
NAME_CHARACTERS_MAX: Final = 64
HOST_CHARACTERS_MAX: Final = 45  # the longest IPv6 literal
VIEW_LINES_MAX: Final = 4096
_ENVELOPE_BYTES: Final = 4  # array header (at most 3) and the protocol number


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What every ping and ack says of its sender."""

    state_hash: bytes  # 8 bytes, see membership.state_hash
    version: Version  # of the sender's own record


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer with an ack of the same sequence, if you are `target`."""

    sequence: int
    target: NodeId
    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True)
class Ack:
    """The subject of the probe is alive; `subject` differs from the sender when it was relayed."""

    sequence: int
    subject: NodeId
    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True)
class PingRequest:
    """Probe `target` for me; relay its ack, or say nack when it is late."""

    sequence: int
    target: NodeId
    address: Address


@dataclass(frozen=True, slots=True)
class Nack:
    """The target has not answered me yet; at least we two can talk."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim about a node. `merged`: out of a table, not a rumour; bad news in it is only a suspicion."""

    update: Update
    merged: bool


@dataclass(frozen=True, slots=True)
class Record:
    """A delta of somebody's record; a rumour is passed on, a repair is not."""

    delta: Delta
    rumour: bool


@dataclass(frozen=True, slots=True)
class Digest:
    """What I hold of all owners with low <= id <= high; owners not listed I do not know."""

    low: NodeId
    high: NodeId
    lines: tuple[DigestLine, ...]
    answer: bool  # ask back for what you lack


@dataclass(frozen=True, slots=True)
class ViewLine:
    """What I believe of a node, without the particulars."""

    node: NodeId
    state: MemberState
    epoch: Epoch
    incarnation: int


@dataclass(frozen=True, slots=True)
class View:
    """What I believe of all nodes with low <= id <= high; nodes not listed I do not know."""

    low: NodeId
    high: NodeId
    lines: tuple[ViewLine, ...]
    answer: bool  # ask back where I know better


@dataclass(frozen=True, slots=True)
class Join:
    """Somebody new, or back, at an address from outside the protocol; its claim comes with it."""

    token: int


@dataclass(frozen=True, slots=True)
class JoinAnswer:
    """Welcome. Members and records come in the same and the next datagrams."""

    token: int


@dataclass(frozen=True, slots=True)
class JoinLater:
    """Too many join at once: come again after this time."""

    token: int
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Soft:
    """A soft reading, by its owner."""

    item: SoftItem


@dataclass(frozen=True, slots=True)
class Pull:
    """Send me what I lack of exactly these owners; of one I do not know at all I hold version 0."""

    lines: tuple[DigestLine, ...]


Message: TypeAlias = (
    Ping
    | Ack
    | PingRequest
    | Nack
    | Claim
    | Record
    | Digest
    | View
    | Join
    | JoinAnswer
    | JoinLater
    | Soft
    | Pull
)

_PING, _ACK, _PING_REQUEST, _NACK, _CLAIM, _RECORD = 1, 2, 3, 4, 5, 6
_DIGEST, _VIEW, _JOIN, _JOIN_ANSWER, _JOIN_LATER, _SOFT, _PULL = 7, 8, 9, 10, 11, 12, 13


def encode(message: Message) -> bytes:
    """One message, to be put in a payload by `payload_of`."""
    match message:
        case Ping(sequence, target, heartbeat):
            return pack((_PING, sequence, target, heartbeat.state_hash, heartbeat.version))
        case Ack(sequence, subject, heartbeat):
            return pack((_ACK, sequence, subject, heartbeat.state_hash, heartbeat.version))
        case PingRequest(sequence, target, address):
            return pack((_PING_REQUEST, sequence, target, *address))
        case Nack(sequence):
            return pack((_NACK, sequence))
        case Claim(update, merged):
            return pack((_CLAIM, *_pack_update(update), merged | update.evidence << 1))
        case Record(delta, rumour):
            return pack((_RECORD, pack_delta(delta), rumour))
        case Digest(low, high, lines, answer):
            return pack((_DIGEST, low, high, pack_digest(lines), answer))
        case View(low, high, view, answer):
            packed = [(one.node, one.state.strength, one.epoch, one.incarnation) for one in view]
            return pack((_VIEW, low, high, packed, answer))
        case Join(token):
            return pack((_JOIN, token))
        case JoinAnswer(token):
            return pack((_JOIN_ANSWER, token))
        case JoinLater(token, retry_after_s):
            return pack((_JOIN_LATER, token, retry_after_s))
        case Soft(item):
            return pack((_SOFT, pack_soft(item)))
        case Pull(lines):
            return pack((_PULL, pack_digest(lines)))
        case _:
            assert_never(message)


def payload_of(encoded: Sequence[bytes]) -> bytes:
    """A payload of encoded messages; its size is at most `payload_bytes` of their sizes."""
    count = len(encoded) + 1
    assert count <= MESSAGES_MAX
    head = bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    return b"".join((head, bytes((PROTOCOL,)), *encoded))


def payload_bytes(encoded: Sequence[bytes]) -> int:
    """An upper bound of the size of their payload."""
    return _ENVELOPE_BYTES + sum(map(len, encoded))


def payloads_of(encoded: Sequence[bytes], bytes_max: int) -> list[bytes]:
    """Distribute messages, in order, over payloads of at most `bytes_max`; an oversized one is our bug."""
    payloads: list[bytes] = []
    batch: list[bytes] = []
    size = _ENVELOPE_BYTES
    for one in encoded:
        assert _ENVELOPE_BYTES + len(one) <= bytes_max, "a message that no payload can hold"
        if batch and (size + len(one) > bytes_max or len(batch) + 2 > MESSAGES_MAX):
            payloads.append(payload_of(batch))
            batch, size = [], _ENVELOPE_BYTES
        batch.append(one)
        size += len(one)
    if batch:
        payloads.append(payload_of(batch))
    return payloads


def decode(payload: bytes) -> tuple[Message, ...]:
    """The messages of a payload.

    Raises:
        CodecError: it, or any message in it, is malformed.
    """
    items = _list(unpack(payload), "a payload", MESSAGES_MAX)
    if not items or items[0] != PROTOCOL or isinstance(items[0], bool):
        raise CodecError("another protocol")
    return tuple(_decode_message(item) for item in items[1:])


def _decode_message(item: object) -> Message:
    fields = _list(item, "a message", 16)
    match fields:
        case [1, sequence, target, state_hash, version]:
            return Ping(_count(sequence), _node(target), _heartbeat(state_hash, version))
        case [2, sequence, subject, state_hash, version]:
            return Ack(_count(sequence), _node(subject), _heartbeat(state_hash, version))
        case [3, sequence, target, host, port]:
            return PingRequest(_count(sequence), _node(target), _address(host, port))
        case [4, sequence]:
            return Nack(_count(sequence))
        case [5, *update, flags]:
            merged, evidence = _claim_flags(flags)
            return Claim(_update(update, evidence), merged)
        case [6, delta, rumour]:
            return Record(unpack_delta(delta), _flag(rumour))
        case [7, low, high, lines, answer]:
            digest = unpack_digest(lines)
            first, last = _range(low, high, [line.owner for line in digest])
            return Digest(first, last, digest, _flag(answer))
        case [8, low, high, lines, answer]:
            view = tuple(_view_line(line) for line in _list(lines, "a view", VIEW_LINES_MAX))
            first, last = _range(low, high, [line.node for line in view])
            return View(first, last, view, _flag(answer))
        case [9, token]:
            return Join(_count(token))
        case [10, token]:
            return JoinAnswer(_count(token))
        case [11, token, retry_after_s]:
            return JoinLater(_count(token), _seconds(retry_after_s))
        case [12, soft]:
            return Soft(unpack_soft(soft))
        case [13, lines]:
            return Pull(unpack_digest(lines))
        case _:
            raise CodecError("an unknown kind of message, or the wrong number of fields")


def _pack_update(update: Update) -> tuple[object, ...]:
    return (
        update.node,
        update.state.strength,
        update.epoch,
        update.incarnation,
        update.name,
        *update.address,
        None if update.accuser == update.node else update.accuser,
    )


def _update(fields: Sequence[object], evidence: bool) -> Update:
    if len(fields) != 8:
        raise CodecError("a claim has the wrong number of fields")
    node, state, epoch, incarnation, name, host, port, accuser = fields
    if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARACTERS_MAX:
        raise CodecError("a name is not a short text")
    return Update(
        _node(node),
        _state(state),
        _epoch(epoch),
        _count(incarnation),
        name,
        _address(host, port),
        _node(node if accuser is None else accuser),
        evidence,
    )


def _claim_flags(item: object) -> tuple[bool, bool]:
    """Bit 0: merged. Bit 1: evidence."""
    flags = _count(item)
    if flags > 3:
        raise CodecError("unknown flags of a claim")
    return bool(flags & 1), bool(flags & 2)


def _view_line(item: object) -> ViewLine:
    fields = _list(item, "a view line", 4)
    if len(fields) != 4:
        raise CodecError("a view line has the wrong number of fields")
    node, state, epoch, incarnation = fields
    return ViewLine(_node(node), _state(state), _epoch(epoch), _count(incarnation))


def _range(low: object, high: object, nodes: Sequence[NodeId]) -> tuple[NodeId, NodeId]:
    first, last = _node(low), _node(high)
    if first > last or any(not first <= node <= last for node in nodes):
        raise CodecError("lines lie outside of their range")
    return first, last


def _list(item: object, what: str, limit: int) -> list[object]:
    if not isinstance(item, list):
        raise CodecError(f"{what} is not a list")
    items = cast("list[object]", item)
    if len(items) > limit:
        raise CodecError(f"{what} has more than {limit} items")
    return items


def _count(item: object) -> int:
    if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= COUNTER_MAX:
        raise CodecError("a counter is out of range")
    return item


def _epoch(item: object) -> Epoch:
    epoch = _count(item)
    if epoch == 0:
        raise CodecError("an epoch is 0")
    return Epoch(epoch)


def _flag(item: object) -> bool:
    if not isinstance(item, bool):
        raise CodecError("a flag is not a bool")
    return item


def _node(item: object) -> NodeId:
    if not isinstance(item, bytes) or len(item) != NODE_ID_BYTES:
        raise CodecError("a node id is not 16 bytes")
    return NodeId(item)


def _state(item: object) -> MemberState:
    strength = _count(item)
    if strength >= len(STATES):
        raise CodecError("an unknown member state")
    return STATES[strength]


def _address(host: object, port: object) -> Address:
    if not isinstance(host, str) or not 0 < len(host) <= HOST_CHARACTERS_MAX:
        raise CodecError("a host is not an address")
    number = _count(port)
    if not 0 < number <= 65_535:
        raise CodecError("a port is out of range")
    return (host, number)


def _heartbeat(state_hash: object, version: object) -> Heartbeat:
    if not isinstance(state_hash, bytes) or len(state_hash) != STATE_HASH_BYTES:
        raise CodecError("a state hash is not 8 bytes")
    return Heartbeat(state_hash, Version(_count(version)))


def _seconds(item: object) -> float:
    if not isinstance(item, int | float) or isinstance(item, bool):
        raise CodecError("a time is not a number")
    if not math.isfinite(item) or not 0 <= item <= 3600:
        raise CodecError("a time is out of range")
    return float(item)
