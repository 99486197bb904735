"""Well-formed messages with extreme contents: they pass the codec, and lie in every field."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Final

from tests.fuzz.support_mutation import flip
from tests.fuzz.support_scene import LIAR, Identity, Traffic
from tests.sim.world import MESH
from tests.unit.support_cms import HashSigner
from tests.unit.support_decrees import generation, revocation

from meshd.core.decrees import DECREE_ID_BYTES
from meshd.core.effects import Address
from meshd.core.membership import STATES, Update
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
from meshd.core.wire import encode, payload_of
from meshd_cms.entries import UNSIGNED, pack_value, sign_entry, sign_head
from meshd_cms.soft import SoftTold
from meshd_cms.types import (
    COUNTER_MAX,
    Delta,
    DigestLine,
    Entry,
    Epoch,
    Head,
    NodeId,
    Value,
    Version,
    node_id_of,
)

PAYLOAD_BYTES_MAX: Final = 1343
_NUMBERS: Final = (
    0,
    1,
    2,
    3,
    7,
    255,
    2**16,
    2**31,
    2**32,
    2**53 - 1,
    2**53,
    2**62,
    COUNTER_MAX - 1,
    COUNTER_MAX,
)
_VALUES: Final[tuple[Value, ...]] = (None, 0, 1.5, float("nan"), "text", b"bytes", [1, [2, [3]]], {"free": float("inf")}, {"a": {"b": None}}, "x" * 480)  # fmt: skip


class Grammar:
    """Makes messages about the nodes of a recorded mesh, its strangers and nobody."""

    def __init__(self, recorded: Traffic) -> None:
        self._nodes = recorded.nodes
        self._ids = [one.node for one in recorded.nodes]
        self._strangers = [HashSigner(bytes((number,)) * 32) for number in range(8)]

    def payload(self, rng: random.Random) -> bytes:
        """A payload of one message or of as many as fit."""
        count = rng.choice((1, 1, 1, 2, 3, 8, 60))
        one = self.message(rng)
        messages = [one if rng.random() < 0.7 else self.message(rng) for _ in range(count)]
        encoded: list[bytes] = []
        room = PAYLOAD_BYTES_MAX - 4
        for message in messages:
            packed = encode(message)
            if len(packed) <= room:
                encoded.append(packed)
                room -= len(packed)
        return payload_of(encoded)

    def message(self, rng: random.Random) -> Message:
        """One message of any kind."""
        number = self._number
        match rng.randrange(17):
            case 0:
                target = self._ids[0] if rng.random() < 0.5 else self._node(rng)
                return Ping(number(rng), target[:TARGET_BYTES], self._heartbeat(rng))
            case 1:
                subject = None if rng.random() < 0.5 else self._node(rng)
                return Ack(number(rng), subject, self._heartbeat(rng))
            case 2:
                return PingRequest(number(rng), self._node(rng), self._address(rng))
            case 3:
                return Nack(number(rng))
            case 4 | 5 | 6:
                return Claim(self._update(rng), rng.random() < 0.3)
            case 7:
                return Record(self._delta(rng), rng.random() < 0.7)
            case 8:
                low, high, ids = self._span(rng)
                lines = tuple(self._digest_line(one, rng) for one in ids)
                return Digest(low, high, lines, rng.random() < 0.5)
            case 9:
                low, high, ids = self._span(rng)
                view = tuple(self._view_line(one, rng) for one in ids)
                return View(low, high, view, rng.random() < 0.5)
            case 10:
                whole = rng.random() < 0.5
                return rng.choice((Join(number(rng)), JoinAnswer(number(rng) % 64, whole)))
            case 11:
                return JoinLater(number(rng) % 64, rng.choice((0.0, 0.1, 3600.0)))
            case 12:
                age_s = rng.choice((0.0, 1.0, 9.0))
                return rng.choice(
                    (
                        Soft(self._soft(rng)),
                        SoftStill(max(1, number(rng)), age_s),
                        Interest(rng.choice((0.0, 1.0, 3600.0))),
                    )
                )
            case 13:
                buckets = 2 ** rng.randrange(9)
                told = rng.choice((bytes(DECREE_ID_BYTES), rng.randbytes(DECREE_ID_BYTES)))
                return Summary(tuple(rng.getrandbits(32) for _ in range(buckets)), told)
            case 14:
                return Proclaim(self._decree(rng), rng.random() < 0.7)
            case 15:
                held = sorted({rng.randbytes(DECREE_ID_BYTES) for _ in range(rng.randrange(5))})
                first, last = bytes(DECREE_ID_BYTES), b"\xff" * DECREE_ID_BYTES
                return DecreesHeld(first, last, tuple(held), rng.random() < 0.5)
            case _:
                ids = self._span(rng)[2]
                return Pull(tuple(self._digest_line(one, rng) for one in ids))

    def _decree(self, rng: random.Random) -> bytes:
        """Of an authority or of nobody: a new key, somebody out who was never in, or noise."""
        signer = rng.choice(self._strangers)
        match rng.randrange(4):
            case 0:
                return rng.randbytes(rng.choice((1, 64, 400)))
            case 1:
                return revocation(signer, NodeId(b"never was member"), rng.randrange(1, 4))
            case 2:
                return flip(generation(signer, 1 + rng.randrange(9)), rng)
            case _:
                return generation(signer, 1 + rng.randrange(9), rng.randrange(1, 4))

    # -- parts ------------------------------------------------------------------------------------------

    def _number(self, rng: random.Random) -> int:
        return rng.choice(_NUMBERS) if rng.random() < 0.4 else rng.randrange(200)

    def _node(self, rng: random.Random) -> NodeId:
        way = rng.random()
        if way < 0.7:
            return rng.choice(self._ids)
        if way < 0.9:
            return node_id_of(rng.choice(self._strangers).public_key)
        return NodeId(rng.choice((bytes(16), b"\xff" * 16, rng.randbytes(16))))

    def _identity(self, rng: random.Random) -> Identity:
        one = rng.choice(self._nodes)
        return one if rng.random() < 0.8 else replace(one, node=self._node(rng))

    def _epoch(self, about: Identity, rng: random.Random) -> Epoch:
        way = rng.random()
        if way < 0.8:
            return Epoch(about.epoch)
        if way < 0.9:
            return Epoch(max(1, about.epoch + rng.choice((-1, 1, 1000))))
        return Epoch(max(1, rng.choice(_NUMBERS)))

    def _address(self, rng: random.Random) -> Address:
        if rng.random() < 0.5:
            return rng.choice(self._nodes).address
        host = rng.choice(("192.0.2.1", "10.0.0.1", "::1", "0.0.0.0", "224.0.0.251", "127.0.0.1"))
        return (host, rng.choice((1, 53, 7946, 65_535)))

    def _update(self, rng: random.Random) -> Update:
        about = self._identity(rng)
        address = about.address if rng.random() < 0.7 else self._address(rng)
        name = about.name if rng.random() < 0.8 else rng.choice(("n" * 64, "node-1", "ä", "x"))
        return Update(
            about.node,
            rng.choice(STATES),
            self._epoch(about, rng),
            rng.choice((0, 0, 0, 1, 2, 3)) if rng.random() < 0.8 else self._number(rng),
            name,
            address,
            self._node(rng),
        )

    def _heartbeat(self, rng: random.Random) -> Heartbeat:
        state_hash = None if rng.random() < 0.3 else rng.randbytes(8)
        return Heartbeat(state_hash, Version(self._number(rng)))

    def _span(self, rng: random.Random) -> tuple[NodeId, NodeId, list[NodeId]]:
        low, high = sorted((self._node(rng), self._node(rng)))
        if rng.random() < 0.5:
            low, high = NodeId(bytes(16)), NodeId(b"\xff" * 16)
        ids = {self._node(rng) for _ in range(rng.choice((0, 1, 3, 12)))}
        return low, high, sorted(one for one in ids if low <= one <= high)

    def _digest_line(self, node: NodeId, rng: random.Random) -> DigestLine:
        known = next((one for one in self._nodes if one.node == node), self._nodes[LIAR])
        versions = (known.record.until, known.record.until + 1, 0, 1, self._number(rng))
        return DigestLine(
            node,
            self._epoch(known, rng),
            Version(rng.choice(versions)),
            Version(self._number(rng) if rng.random() < 0.3 else 0),
        )

    def _view_line(self, node: NodeId, rng: random.Random) -> ViewLine:
        known = next((one for one in self._nodes if one.node == node), self._nodes[LIAR])
        return ViewLine(node, rng.choice(STATES), self._epoch(known, rng), self._number(rng))

    def _soft(self, rng: random.Random) -> SoftTold:
        key = rng.choice(("load", "load", "task/1", "k" * 64, f"key/{rng.randrange(100)}"))
        age_s = rng.choice((0.0, 1.0, 9.99, 1e9))
        return SoftTold(max(1, self._number(rng)), key, rng.choice(_VALUES), age_s)

    def _delta(self, rng: random.Random) -> Delta:
        """Somebody's true record, whole or with one part changed, or one that a liar signed itself."""
        if rng.random() < 0.4:
            record = rng.choice(self._nodes).record
            if rng.random() < 0.5:
                return record
            number = Version(self._number(rng))
            return rng.choice(
                (
                    replace(record, since=number),
                    replace(record, until=Version(max(1, number))),
                    replace(record, entries=record.entries[1:]),
                    replace(record, entries=(*record.entries, *record.entries)),
                    replace(record, head=replace(record.head, floor=number)),
                    replace(record, epoch=Epoch(max(1, number))),
                )
            )
        return self.signed_delta(rng)

    def signed_delta(self, rng: random.Random) -> Delta:
        """A delta that its owner, the liar or a stranger, signed: only its contents are wrong."""
        liar = self._nodes[LIAR]
        signer = liar.signer if rng.random() < 0.7 else rng.choice(self._strangers)
        owner, epoch = node_id_of(signer.public_key), self._epoch(liar, rng)
        top = max(1, self._number(rng))
        versions = sorted(
            {max(1, top - rng.randrange(6)) for _ in range(rng.choice((0, 1, 1, 3, 9)))}
        )
        entries = tuple(
            sign_entry(
                signer,
                MESH,
                owner,
                epoch,
                Entry(
                    f"key/{rng.randrange(40)}",
                    rng.choice((None, pack_value(rng.choice(_VALUES)), b"\xc1", b"\x91" * 30)),
                    Version(version),
                    UNSIGNED,
                ),
            )
            for version in versions
        )
        floor = Version(rng.choice((0, 0, 0, 1, top - 1, top, COUNTER_MAX)))
        head = Head(
            owner, epoch, Version(top), floor, rng.randbytes(16), signer.public_key, UNSIGNED
        )
        since = Version(rng.choice((0, 0, max(0, top - 6), top, COUNTER_MAX)))
        return Delta(owner, epoch, since, Version(top), entries, sign_head(signer, MESH, head))
