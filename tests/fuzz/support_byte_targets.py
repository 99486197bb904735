"""Fuzz targets beside the gossip core: sealed datagrams, streams and records."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from time import thread_time
from typing import Final

from tests.fuzz.support_figures import Broken
from tests.fuzz.support_grammar import Grammar
from tests.fuzz.support_mutation import NUMBERS, mutant
from tests.fuzz.support_scene import NODES, VICTIM, traffic
from tests.fuzz.support_sizes import sizes
from tests.fuzz.support_targets import Target
from tests.sim.world import MESH
from tests.unit.support_cms import hash_verify

from meshd.core.frame_codec import LENGTH_BYTES
from meshd.core.frame_codec import decode as decode_frame
from meshd.core.frame_codec import encode as encode_frame
from meshd.core.frames import (
    Call,
    CallHeader,
    Cancel,
    Chunk,
    Credit,
    End,
    Error,
    Frame,
    Goaway,
    Gossip,
    Hello,
    Ping,
    Pong,
    ProtocolError,
    Refuse,
)
from meshd.core.messages import Record
from meshd.core.mux import CallState, Event, Mux, MuxConfig, Phase
from meshd.core.sealing import DropReason, Opened, Opener, Sealer
from meshd.core.wire import decode
from meshd_cms.codec import pack_delta, unpack_delta
from meshd_cms.entries import sign_head
from meshd_cms.errors import CodecError
from meshd_cms.packing import pack, unpack
from meshd_cms.store import Store
from meshd_cms.types import (
    Applied,
    Delta,
    Epoch,
    Head,
    Known,
    NodeId,
    OwnEpochSeen,
    Parked,
    Rejected,
    StoreConfig,
    Value,
    Version,
)

_KEY: Final = b"k" * 32
_SENDERS: Final = 16
"""More than there are, so that nobody is forgotten and each datagram is opened once at most."""


class SealedTarget(Target):
    """`Opener.open`: raw datagrams, true ones, replays, and some under a wrong key."""

    name = "sealed"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        ids = [one.node for one in traffic().nodes]
        self._me, self._other = ids[VICTIM], ids[1]
        self._opener = Opener([_KEY, b"o" * 32], MESH, self._me, senders_max=_SENDERS)
        keys = [_KEY] * 8 + [b"o" * 32, b"w" * 32]
        self._sealers = [
            Sealer(key, MESH, ids[number % NODES], Epoch(10 + number // 12))
            for number, key in enumerate(keys, start=VICTIM)
        ]
        self._lives = 100
        self._payloads = [heard.payload for heard in traffic().heard if len(heard.payload) <= 1343]
        self._sent: list[bytes] = [b""]
        self._sealed: set[bytes] = set()
        self._opened: set[bytes] = set()
        self._now_s = 0.0
        self._fed = 0

    def case(self) -> bytes:
        rng, way = self.rng, self.rng.random()
        if way < 0.4:
            sealer = rng.choice(self._sealers)
            to = rng.choice((self._me, self._me, self._me, None, self._other))
            datagram = sealer.seal(rng.choice(self._payloads), to)
            if rng.random() < 0.02:
                self._lives += 1
                sealer.rekey(Epoch(self._lives))
            self._sent.append(datagram)
            self._sealed.add(datagram)
            del self._sent[:-500]
            return datagram
        if way < 0.6:
            return rng.choice(self._sent)
        if way < 0.8:
            return self._forged()
        return mutant(self._sent, rng)

    def _forged(self) -> bytes:
        """The header lies, the rest is as it was."""
        data = bytearray(self.rng.choice(self._sent[-50:]).ljust(33, b"\x00"))
        at, length = self.rng.choice(((0, 1), (1, 4), (5, 16), (21, 6), (27, 6)))
        value = self.rng.choice((self.rng.getrandbits(8 * length), *(abs(one) for one in NUMBERS)))
        data[at : at + length] = (value % 256**length).to_bytes(length, "big")
        return bytes(data)

    def feed(self, data: bytes) -> None:
        began_s = thread_time()
        opened = self._opener.open(data, self._now_s)
        took_s = thread_time() - began_s
        self._fed += 1
        outcome = "opened" if isinstance(opened, Opened) else opened.reason.value
        self._now_s += 0.001
        if isinstance(opened, Opened):
            if data not in self._sealed and len(self._sent) > 1:
                raise Broken("what nobody sealed was opened")
            if data in self._opened and not opened.is_old_epoch:
                raise Broken("a datagram was opened twice")
            self._opened.add(data)
            outcome += " old epoch" * opened.is_old_epoch
        self.figures.note(outcome, data, took_s)
        self.figures.outcomes[outcome] += 1
        counted = self._opener.statistics()
        if sum(counted[name] for name in ("opened", *map(str, DropReason))) != self._fed:
            raise Broken("a datagram was not accounted for")

    def finish(self) -> None:
        found = sizes(self._opener)
        self.figures.hold(found)
        if max(found["_UnderKey.senders"], found["Opener._last"]) > _SENDERS:
            raise Broken("more senders are remembered than allowed")


# -- streams -----------------------------------------------------------------------------------------------

_FRAMES: Final = MuxConfig(frame_bytes_max=65_536, window_bytes=4_096, calls_max=8)
_HEADER: Final = CallHeader("request", "computation.gpt/echo", "echo", "run")


class StreamTarget(Target):
    """`Mux` and the frame codec. An input: how it is cut into pieces, then what a peer sends."""

    name = "stream"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._me, self._peer = (one.node for one in traffic().nodes[:2])
        self._corpus = [self._conversation(random.Random(seed)) for seed in range(40)]

    def case(self) -> bytes:
        rng, way = self.rng, self.rng.random()
        if way < 0.5:
            return bytes((rng.randrange(256),)) + self._conversation(rng)
        if way < 0.8:
            return bytes((rng.randrange(256),)) + self._spoilt(rng)
        return mutant(self._corpus, rng)

    def _hello(self) -> Hello:
        return Hello(MESH, self._peer, Epoch(3), 65_536, 4_096)

    def _conversation(self, rng: random.Random) -> bytes:
        """Frames that each are well-formed, in any order."""
        frames = [self._hello()] if rng.random() < 0.9 else []
        some = [_frame(rng) for _ in range(rng.randrange(30))]
        return b"".join(encode_frame(frame) for frame in [*frames, *some])

    def _spoilt(self, rng: random.Random) -> bytes:
        """Well-framed packets whose insides are mutants."""
        packets = [encode_frame(self._hello())]
        for _ in range(rng.randrange(1, 6)):
            valid = [encode_frame(_frame(rng))[LENGTH_BYTES:] for _ in range(2)]
            packed = mutant(valid, rng)
            packets.append(len(packed).to_bytes(LENGTH_BYTES, "big") + packed)
        return b"".join(packets)

    def feed(self, data: bytes) -> None:
        if not data:
            return
        cuts, sent = random.Random(data[0]), data[1:]
        whole, began_s = self._mux(), thread_time()
        events, fault = _events(whole, [sent])
        took_s = thread_time() - began_s
        pieces: list[bytes] = []
        rest = sent
        while rest:
            size = cuts.choice((1, 2, 3, 5, 50, 1_000, 70_000))
            pieces.append(rest[:size])
            rest = rest[size:]
        cut = self._mux()
        if _events(cut, pieces) != (events, fault):
            raise Broken("the events depend on how the bytes were cut into pieces")
        if whole.take_outgoing() != cut.take_outgoing():
            raise Broken("what is answered depends on how the bytes were cut into pieces")
        if whole.serving > 2 * _FRAMES.calls_max:
            raise Broken(f"{whole.serving} calls are served at once")
        kind = fault or "fine"
        self.figures.note(kind, data, took_s)
        self.figures.outcomes[kind] += 1
        if fault and (whole.phase is not Phase.FAILED or whole.next_event() is not None):
            raise Broken("a connection goes on after a fault")
        self._check_frames(sent)

    def _mux(self) -> Mux:
        mux = Mux(_FRAMES, MESH, self._me, Epoch(2), self._peer, dialer=True)
        mux.receive(encode_frame(self._hello()))
        mux.next_event()
        for _ in range(3):
            mux.open(_HEADER, None)
        mux.cancel(5, "changed my mind")
        assert mux.state(1) is CallState.ASKING
        mux.take_outgoing()
        return mux

    @staticmethod
    def _check_frames(sent: bytes) -> None:
        """What decodes can be encoded, and decodes to the same."""
        while len(sent) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(sent[:LENGTH_BYTES], "big")
            packed, sent = sent[LENGTH_BYTES:end], sent[end:]
            try:
                frame = decode_frame(packed)
            except ProtocolError:
                continue
            again = decode_frame(encode_frame(frame)[LENGTH_BYTES:])
            if repr(again) != repr(frame) and not _is_clipped(frame):
                raise Broken(f"{frame} came back as {again}")


def _is_clipped(frame: Frame) -> bool:
    """Texts for people are cut when they are sent: see `frame_codec._clip`."""
    texts = [getattr(frame, name, "") for name in ("code", "message", "reason")]
    return any(isinstance(text, str) and len(text) * 4 > 1024 for text in texts)


def _events(mux: Mux, pieces: list[bytes]) -> tuple[list[str], str]:
    """The events (as text, since NaN equals nothing), and the fault that ended them."""
    events: list[str] = []
    for piece in pieces:
        mux.receive(piece)
        try:
            while (event := mux.next_event()) is not None:
                events.append(repr(event))
                _react(mux, event)
        except ProtocolError as error:
            return events, error.code
    return events, ""


def _react(mux: Mux, event: Event) -> None:
    """As a server does: refuse some calls, answer others, keep the rest waiting."""
    if isinstance(event, Call) and mux.state(event.call) is CallState.SERVING:
        if event.call % 3 == 0:
            mux.refuse(event.call, "busy", "no", None)
        elif event.call % 3 == 1 and mux.may_send(event.call):
            mux.send_chunk(event.call, "part")


def _frame(rng: random.Random) -> Frame:
    call = rng.choice((1, 1, 3, 5, 2, 2, 4, 6, 8, 10, 2**62, rng.randrange(1, 80)))
    number = rng.choice((0, 1, 100, 4_096, 2**32, 2**63 - 1))
    values: tuple[Value, ...] = (
        None,
        1,
        "text",
        b"x" * 100,
        [1, [2, [3]]],
        {"a": {"b": [None, True]}},
        float("nan"),
        "y" * 3000,
    )
    value = rng.choice(values)
    match rng.randrange(12):
        case 0:
            return Call(
                call, replace(_HEADER, hops=number % 256, trace="t" * (number % 1000)), value
            )
        case 1 | 2:
            return Chunk(call, value)
        case 3:
            return End(call, value, None)
        case 4:
            return Refuse(call, "busy", "no" * 200, value)
        case 5:
            return Error(call, "broke", "", rng.random() < 0.5, value)
        case 6:
            return Cancel(call, "enough")
        case 7:
            return Credit(call, number)
        case 8:
            return Ping(number)
        case 9:
            return Pong(number)
        case 10:
            return Gossip(b"payload" * (number % 100))
        case _:
            return rng.choice((Goaway("closing"), Hello(MESH, NodeId(b"n" * 16), Epoch(1))))


# -- records -----------------------------------------------------------------------------------------------


class RecordTarget(Target):
    """The delta codec and `Store.apply`, on a store that holds a dozen records."""

    name = "record"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        recorded = traffic()
        mine = recorded.nodes[VICTIM]
        self._store = Store(StoreConfig(), MESH, mine.signer, Epoch(mine.epoch), hash_verify)
        self._store.set("own", 1)
        for one in recorded.nodes[1:]:
            self._store.apply(one.record, 0.0)
        self._own = self._store.items(mine.node)
        self._grammar = Grammar(recorded)
        self._nodes = recorded.nodes
        self._corpus = _packed_deltas()
        self._now_s = 0.0

    def case(self) -> bytes:
        rng, way = self.rng, self.rng.random()
        if way < 0.5:
            return mutant(self._corpus, rng)
        if way < 0.75:
            return pack(pack_delta(self._grammar.signed_delta(rng)))
        return pack(pack_delta(self._signed_anew(rng)))

    def _signed_anew(self, rng: random.Random) -> Delta:
        """A member's own delta with a head that it signed itself, and should not have."""
        one = rng.choice(self._nodes[1:])
        true = one.record.head
        head = Head(
            true.owner,
            true.epoch,
            Version(max(1, true.max_version + rng.choice((-1, 0, 1, 5, 2**40)))),
            Version(rng.choice((0, 1, true.max_version, true.max_version + 1))),
            rng.choice((true.live_digest, rng.randbytes(16))),
            true.public_key,
            b"",
        )
        since, until = rng.choice((0, one.record.until)), head.max_version
        entries = rng.choice((one.record.entries, one.record.entries[1:], ()))
        return Delta(
            true.owner,
            true.epoch,
            Version(since),
            until,
            entries,
            sign_head(one.signer, MESH, head),
        )

    def feed(self, data: bytes) -> None:
        store = self._store
        began_s = thread_time()
        try:
            delta = unpack_delta(unpack(data))
        except CodecError:
            self.figures.note("malformed", data, thread_time() - began_s)
            self.figures.outcomes["malformed"] += 1
            return
        lines = {owner: store.line(owner) for owner in store.owners()}
        before = [store.items(owner) for owner in store.owners()]
        self._now_s += 0.01
        began_s = thread_time()
        result = store.apply(delta, self._now_s)
        took_s = thread_time() - began_s
        kind = type(result).__name__
        if isinstance(result, Rejected):
            kind += f" {result.reason.value}"
        self.figures.note(kind, data, took_s)
        self.figures.outcomes[kind] += 1
        after = {owner: store.line(owner) for owner in store.owners()}
        match result:
            case Applied(owner):
                del after[owner]
                if any(after[one] != lines.get(one) for one in after):
                    raise Broken("another record than the delta's was moved")
            case Known() | Parked() | Rejected() | OwnEpochSeen():
                if lines != after or before != [store.items(owner) for owner in store.owners()]:
                    raise Broken(f"{kind} changed a record")
        if store.items(store.owner) != self._own:
            raise Broken("our own record was written by a delta")
        again = unpack_delta(unpack(pack(pack_delta(delta))))
        if again != delta:
            raise Broken("a delta does not survive the codec")

    def finish(self) -> None:
        found = sizes(self._store)
        self.figures.hold(found)
        if found["Store._parked"] > StoreConfig().parked_max:
            raise Broken("too many deltas are parked")
        saved = self._store.snapshot()
        mine = self._nodes[VICTIM]
        back = Store.restore(
            saved, StoreConfig(), MESH, mine.signer, Epoch(1), hash_verify, as_of_s=0.0
        )
        if [back.items(owner) for owner in back.owners()] != [
            self._store.items(owner) for owner in self._store.owners() if owner != mine.node
        ]:
            raise Broken("a snapshot does not give back what was held")


@cache
def _packed_deltas() -> list[bytes]:
    records = {
        pack(pack_delta(message.delta))
        for heard in traffic().heard
        for message in decode(heard.payload)
        if isinstance(message, Record)
    }
    return sorted(records)
