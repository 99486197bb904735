"""The codec of the gossip protocol's messages (`meshd.core.messages`).

A payload is one msgpack array: the protocol number, then messages, each an array that starts with its
kind. Decoding is strict and whole: a payload of which any part is malformed is no payload, and nothing of
it is acted upon. Decoders raise `CodecError` and nothing else.

What the seal of the datagram says already (sender and epoch), and what the receiver said itself a moment
ago, is left out: an idle mesh is mostly headers (decision 0015).

Numbers are never reused. A message a later protocol adds gets a new kind; this one refuses kinds it does
not know, because a half-understood datagram cannot be repaired.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, assert_never, cast

from meshd.core.buckets import pack_hashes, unpack_hashes
from meshd.core.decrees import DECREE_BYTES_MAX, DECREE_ID_BYTES, DECREES_MAX
from meshd.core.effects import Address
from meshd.core.membership import STATE_HASH_BYTES, STATES, MemberState, Update
from meshd.core.messages import (
    TARGET_BYTES,
    Ack,
    Claim,
    DecreesHeld,
    Digest,
    Heartbeat,
    Interest,
    Join,
    JoinAnswer,
    JoinLater,
    Message,
    Nack,
    Ping,
    PingRequest,
    Proclaim,
    Pull,
    Record,
    Soft,
    SoftStill,
    Summary,
    View,
    ViewLine,
)
from meshd_cms.codec import (
    pack_delta,
    pack_digest,
    pack_soft,
    unpack_age_s,
    unpack_delta,
    unpack_digest,
    unpack_soft,
)
from meshd_cms.errors import CodecError
from meshd_cms.packing import pack, unpack
from meshd_cms.types import (
    COUNTER_MAX,
    EPOCH_MAX,
    NODE_ID_BYTES,
    Epoch,
    NodeId,
    Version,
)

PROTOCOL: Final = 1
MESSAGES_MAX: Final = 4096  # in one payload
NAME_CHARACTERS_MAX: Final = 64
HOST_CHARACTERS_MAX: Final = 45  # the longest IPv6 literal
VIEW_LINES_MAX: Final = 4096
_ENVELOPE_BYTES: Final = 4  # array header (at most 3) and the protocol number


_PING, _ACK, _PING_REQUEST, _NACK, _CLAIM, _RECORD = 1, 2, 3, 4, 5, 6
_DIGEST, _VIEW, _JOIN, _JOIN_ANSWER, _JOIN_LATER, _SOFT, _PULL = 7, 8, 9, 10, 11, 12, 13
_SOFT_STILL, _INTEREST, _SUMMARY, _PROCLAIM, _DECREES_HELD = 14, 15, 16, 17, 18


def encode(message: Message) -> bytes:
    """One message, to be put in a payload by `payload_of`."""
    match message:
        case Ping(sequence, target, heartbeat):
            return pack(
                (_PING, sequence, target[:TARGET_BYTES], heartbeat.state_hash, heartbeat.version)
            )
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
        case JoinAnswer(token, is_whole):
            return pack((_JOIN_ANSWER, token, is_whole))
        case JoinLater(token, retry_after_s):
            return pack((_JOIN_LATER, token, retry_after_s))
        case Soft(told):
            return pack((_SOFT, *pack_soft(told)))
        case Pull(lines):
            return pack((_PULL, pack_digest(lines)))
        case SoftStill(sequence, age_s):
            return pack((_SOFT_STILL, sequence, round(age_s * 1000)))
        case Interest(for_s):
            return pack((_INTEREST, for_s))
        case Summary(hashes, decrees):
            return pack((_SUMMARY, pack_hashes(hashes), decrees if any(decrees) else None))
        case Proclaim(raw, rumour):
            return pack((_PROCLAIM, raw, rumour))
        case DecreesHeld(first, last, ids, answer):
            return pack((_DECREES_HELD, first, last, b"".join(ids), answer))
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
            told = _bytes(state_hash, STATE_HASH_BYTES, "a state hash")
            prefix = _bytes(target, TARGET_BYTES, "a target")
            return Ping(_count(sequence), prefix, Heartbeat(told, _version(version)))
        case [2, sequence, subject, state_hash, version]:
            named = None if subject is None else _node(subject)
            said = (
                None if state_hash is None else _bytes(state_hash, STATE_HASH_BYTES, "a state hash")
            )
            return Ack(_count(sequence), named, Heartbeat(said, _version(version)))
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
        case [10, token, is_whole]:
            return JoinAnswer(_count(token), _flag(is_whole))
        case [11, token, retry_after_s]:
            return JoinLater(_count(token), _seconds(retry_after_s))
        case [12, *soft]:
            return Soft(unpack_soft(soft))
        case [13, lines]:
            return Pull(unpack_digest(lines))
        case [14, sequence, age_ms]:
            return SoftStill(_count(sequence), unpack_age_s(age_ms))
        case [15, for_s]:
            return Interest(_seconds(for_s))
        case [16, hashes, decrees]:
            told = (
                bytes(DECREE_ID_BYTES)
                if decrees is None
                else _bytes(decrees, DECREE_ID_BYTES, "a hash of decrees")
            )
            return Summary(unpack_hashes(hashes), told)
        case [17, raw, rumour]:
            if not isinstance(raw, bytes) or len(raw) > DECREE_BYTES_MAX:
                raise CodecError("a decree is not a short string of bytes")
            return Proclaim(raw, _flag(rumour))
        case [18, first_id, last_id, ids, answer]:
            return _decrees_held(first_id, last_id, ids, answer)
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
    if not name.isprintable():  # it is shown in terminals
        raise CodecError("a name holds what is not printable")
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


def _decrees_held(low: object, high: object, ids: object, answer: object) -> DecreesHeld:
    first, last = _bytes(low, DECREE_ID_BYTES, "an id"), _bytes(high, DECREE_ID_BYTES, "an id")
    if not isinstance(ids, bytes) or len(ids) > DECREES_MAX * DECREE_ID_BYTES:
        raise CodecError("the ids of decrees are not a string of bytes")
    listed = tuple(ids[at : at + DECREE_ID_BYTES] for at in range(0, len(ids), DECREE_ID_BYTES))
    if len(ids) % DECREE_ID_BYTES or any(not first <= one <= last for one in listed):
        raise CodecError("ids of decrees lie outside of their range")
    return DecreesHeld(first, last, listed, _flag(answer))


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
    if not 1 <= epoch <= EPOCH_MAX:
        raise CodecError("an epoch is out of range")
    return Epoch(epoch)


def _flag(item: object) -> bool:
    if not isinstance(item, bool):
        raise CodecError("a flag is not a bool")
    return item


def _node(item: object) -> NodeId:
    return NodeId(_bytes(item, NODE_ID_BYTES, "a node id"))


def _state(item: object) -> MemberState:
    strength = _count(item)
    if strength >= len(STATES):
        raise CodecError("an unknown member state")
    return STATES[strength]


def _address(host: object, port: object) -> Address:
    if not isinstance(host, str) or not 0 < len(host) <= HOST_CHARACTERS_MAX:
        raise CodecError("a host is not an address")
    if not _is_host(host):
        raise CodecError("a host is not an address of one machine")
    number = _count(port)
    if not 0 < number <= 65_535:
        raise CodecError("a port is out of range")
    return (host, number)


@lru_cache(maxsize=4096)
def _is_host(text: str) -> bool:
    """Whether it is the literal of an address that one machine can have.

    Anything else would be looked up by name, which blocks, or reach many machines at once.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_multicast or text == "255.255.255.255")


def _version(item: object) -> Version:
    return Version(_count(item))


def _bytes(item: object, size: int, what: str) -> bytes:
    if not isinstance(item, bytes) or len(item) != size:
        raise CodecError(f"{what} is not {size} bytes")
    return item


def _seconds(item: object) -> float:
    if not isinstance(item, int | float) or isinstance(item, bool):
        raise CodecError("a time is not a number")
    if not math.isfinite(item) or not 0 <= item <= 3600:
        raise CodecError("a time is out of range")
    return float(item)
