"""The llama plugin's half of hand-over: what it asks of its worker, and what it takes from it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
import trio
import trio.testing

from meshd_plugins.api import (
    Failed,
    PrefixHead,
    Privacy,
    Refused,
    Value,
    WarmPrefix,
    WorkerCall,
    WorkerSpec,
)
from meshd_plugins.builtin.llama.serving.warmth import (
    AGAIN_S,
    AHEAD_BYTES,
    AHEAD_CALLS,
    ANSWER_S,
    PIECE_BYTES,
    STATE_BYTES_MAX,
    WarmPrefixes,
    keeps_prefixes,
    kv_bytes_per_token,
)
from meshd_plugins.testing import FakeWorker

TAG, CALLER = b"tag-0001", "n1/key:anna"
DATA = bytes(range(256)) * 8192  # 2 MiB
HEAD: dict[str, Value] = {
    "tokens": bytes(4 * 300),
    "bytes": len(DATA),
    "hash": hashlib.blake2b(DATA, digest_size=32).digest(),
    "privacy": int(Privacy.LAN),
}
HELLO: dict[str, Value] = {"kv_bytes_per_token": 23_040}
PREFIX = PrefixHead(
    TAG,
    CALLER,
    Privacy.LAN,
    bytes(4 * 300),
    len(DATA),
    hashlib.blake2b(DATA, digest_size=32).digest(),
)


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


@dataclass
class Script:
    """A worker that does as it should, unless told otherwise."""

    head: Mapping[str, Value] = field(default_factory=lambda: HEAD)
    read: Callable[[int, int], bytes] = lambda at, size: DATA[at : at + size]
    warm: Value = field(default_factory=lambda: [[TAG, 300]])
    refuses: str = ""  # this operation
    asked: list[Mapping[str, Value]] = field(default_factory=list[Mapping[str, Value]])
    taken: bytearray = field(default_factory=bytearray)
    worker: FakeWorker | None = None

    def __call__(self, message: Mapping[str, Value], /) -> Sequence[Mapping[str, Value]]:
        self.asked.append(message)
        operation = message["operation"]
        if operation == self.refuses:
            raise Refused("no room", code="no_room")
        match operation:
            case "status":
                return [{"slots_busy": 1, "warm": self.warm}]
            case "kv_export":
                return [{"head": self.head, "export": 5}]
            case "kv_read":
                at, size = message["at"], message["bytes"]
                assert message["export"] == 5
                assert isinstance(at, int)
                assert isinstance(size, int)
                return [{"data": self.read(at, size)}]
            case "kv_begin":
                return [{"import": 7}]
            case "kv_data":
                assert isinstance(message["data"], bytes)
                self.taken += message["data"]
                return []
            case "kv_commit":
                return [{"tokens": 300}]
            case _:
                return []

    @property
    def operations(self) -> list[Value]:
        return [message["operation"] for message in self.asked]

    def prefixes(self, hello: Mapping[str, Value] = HELLO) -> WarmPrefixes:
        self.worker = FakeWorker(WorkerSpec("fake", ()), self, hello)
        return WarmPrefixes(self.worker)


async def pieces_of(data: bytes, size: int) -> AsyncGenerator[bytes, None]:
    for at in range(0, len(data), size):
        await trio.lowlevel.checkpoint()
        yield data[at : at + size]


async def export(script: Script, *, away: Privacy = Privacy.LAN) -> tuple[PrefixHead, bytes]:
    found = bytearray()
    async with script.prefixes().export_prefix(TAG, CALLER, away) as exported:
        while (data := await exported.receive()) is not None:
            found += data
        return exported.head, bytes(found)


def test_what_is_warm_is_what_the_worker_last_said() -> None:
    async def test() -> None:
        script = Script()
        prefixes = script.prefixes()
        assert prefixes.warm() == ()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefixes.run)
            await trio.sleep(AGAIN_S / 2)
            assert prefixes.status["slots_busy"] == 1
            script.warm = [[b"tag-0002", 600], [TAG, 300]]
            await trio.sleep(AGAIN_S)
            nursery.cancel_scope.cancel()
        assert script.operations == ["status", "status"]

    run(test)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ([[TAG, 300]], (WarmPrefix(TAG, 300),)),
        ([[TAG, 300], [b"short", 300], [TAG], 7, [TAG, 0], [TAG, 2**40]], (WarmPrefix(TAG, 300),)),
        (None, ()),
        ("warm", ()),
        ([[TAG, 300]] * 1000, (WarmPrefix(TAG, 300),) * 64),
    ],
)
def test_what_a_worker_says_of_it_is_bounded_and_checked(
    said: Value, read: tuple[WarmPrefix, ...]
) -> None:
    async def test() -> None:
        seen: list[Sequence[WarmPrefix]] = []

        class Slow(Script):
            def __call__(self, message: Mapping[str, Value], /) -> Sequence[Mapping[str, Value]]:
                return [{"warm": said}, {"warm": said}]

        prefixes = Slow().prefixes()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefixes.run)
            while not prefixes.status:
                await trio.lowlevel.checkpoint()
            seen.append(prefixes.warm())
            nursery.cancel_scope.cancel()
        assert seen == [read]

    run(test)


@pytest.mark.parametrize("said", [0, -1, True, "many", None, 2**40])
def test_a_worker_that_hands_nothing_over_keeps_nothing_warm(said: Value) -> None:
    async def test() -> None:
        prefixes = Script().prefixes({"kv_bytes_per_token": said})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefixes.run)
            await trio.sleep(AGAIN_S / 2)
            assert prefixes.status["slots_busy"] == 1
            assert prefixes.warm() == ()
            nursery.cancel_scope.cancel()

    assert not keeps_prefixes({"kv_bytes_per_token": said})
    assert kv_bytes_per_token({}) == 0
    run(test)


def test_a_state_is_handed_out_with_its_head() -> None:
    async def test() -> None:
        script = Script()
        head, data = await export(script)
        assert (head, data) == (PREFIX, DATA)
        assert script.asked[0] == {"operation": "kv_export", "tag": TAG, "caller": CALLER}
        assert set(script.operations[1:]) == {"kv_read"}

    run(test)


def test_no_more_of_a_state_is_asked_for_than_is_taken_however_large_it_is() -> None:
    async def test() -> None:
        size = 100 * AHEAD_BYTES + 1
        script = Script({**HEAD, "bytes": size}, read=lambda _at, size: bytes(size))
        taken = 0
        async with script.prefixes().export_prefix(TAG, CALLER, Privacy.LAN) as exported:
            while (data := await exported.receive()) is not None:
                asked = [m["bytes"] for m in script.asked if m["operation"] == "kv_read"]
                assert sum(each for each in asked if isinstance(each, int)) <= taken + AHEAD_BYTES
                assert len(data) <= PIECE_BYTES
                taken += len(data)
        assert taken == size

    run(test)


def test_one_who_takes_no_more_asks_for_no_more() -> None:
    async def test() -> None:
        script = Script({**HEAD, "bytes": 100 * AHEAD_BYTES}, read=lambda _at, size: bytes(size))
        async with script.prefixes().export_prefix(TAG, CALLER, Privacy.LAN) as exported:
            assert await exported.receive() is not None
            await trio.sleep(60.0)
        assert script.operations.count("kv_read") == AHEAD_CALLS

    run(test)


class Silent(FakeWorker):
    """Answers no call of one operation."""

    operation: Value = ""

    @asynccontextmanager
    async def _call(self, message: Mapping[str, Value]) -> AsyncGenerator[WorkerCall, None]:
        async with super()._call(message) as call:
            yield Never() if message["operation"] == self.operation else call


class Never:
    async def receive(self) -> Mapping[str, Value] | None:
        await trio.sleep_forever()
        return None


async def handed_over(prefixes: WarmPrefixes, *, out: bool) -> None:
    if out:
        async with prefixes.export_prefix(TAG, CALLER, Privacy.LAN) as exported:
            await exported.receive()
    else:
        await prefixes.import_prefix(PREFIX, pieces_of(DATA, 1 << 20))


@pytest.mark.parametrize("operation", ["kv_export", "kv_read", "kv_begin", "kv_data", "kv_commit"])
def test_a_worker_that_does_not_answer_is_waited_for_a_while(operation: str) -> None:
    async def test() -> None:
        worker = Silent(WorkerSpec("fake", ()), Script(), HELLO)
        worker.operation = operation
        prefixes = WarmPrefixes(worker)
        with pytest.raises(Failed) as caught:
            await handed_over(prefixes, out=operation in ("kv_export", "kv_read"))
        assert caught.value.code == "deadline_exceeded"
        assert ANSWER_S <= trio.current_time() < 2 * ANSWER_S + 2

    run(test)


def test_what_a_worker_refuses_when_it_has_begun_is_a_failure() -> None:
    async def test() -> None:
        with pytest.raises(Failed):  # Refused would say that another may be asked for it
            await export(Script(refuses="kv_read"))

    run(test)


@pytest.mark.parametrize(
    ("privacy", "away", "goes"),
    [
        (Privacy.LAN, Privacy.LAN, True),
        (Privacy.LAN, Privacy.MESH, False),
        (Privacy.MESH, Privacy.MESH, True),
        (Privacy.LOCAL, Privacy.LAN, False),
        (Privacy.LOCAL, Privacy.LOCAL, False),
        (None, Privacy.LAN, False),
        (9, Privacy.LAN, False),
    ],
)
def test_a_state_goes_no_further_than_its_class(
    privacy: int | None, away: Privacy, goes: bool
) -> None:
    async def test() -> None:
        script = Script({**HEAD, "privacy": privacy})
        if goes:
            assert (await export(script, away=away))[1] == DATA
            return
        with pytest.raises(Refused) as caught:
            await export(script, away=away)
        assert caught.value.code == "privacy"

    run(test)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": b""},
        {"tokens": b"123"},
        {"tokens": [1, 2, 3]},
        {"hash": b"short"},
        {"bytes": 0},
        {"bytes": "all"},
        {"bytes": STATE_BYTES_MAX + 1},
    ],
)
def test_a_head_that_makes_no_sense_is_a_failure(change: dict[str, Value]) -> None:
    async def test() -> None:
        with pytest.raises(Failed):
            await export(Script({**HEAD, **change}))

    run(test)


@pytest.mark.parametrize(
    "script",
    [
        Script(read=lambda at, size: DATA[at : at + size - 1]),
        Script(read=lambda at, size: DATA[at : at + size] + b"x"),
        Script(read=lambda _at, _size: b""),
    ],
)
def test_a_state_that_is_not_as_long_as_it_said_is_a_failure(script: Script) -> None:
    async def test() -> None:
        with pytest.raises(Failed):
            await export(script)

    run(test)


def test_small_pieces_are_gathered() -> None:
    async def test() -> None:
        script = Script()
        whole = DATA * (2 * AHEAD_CALLS * PIECE_BYTES // len(DATA))
        head = replace(PREFIX, size_bytes=len(whole))
        await script.prefixes().import_prefix(head, pieces_of(whole, 128 * 1024))
        assert bytes(script.taken) == whole
        assert script.operations.count("kv_data") == 2 * AHEAD_CALLS

    run(test)


@pytest.mark.parametrize("piece_bytes", [1 << 20, 128 * 1024, 1_000])
def test_a_state_is_taken_in_in_order_whatever_its_pieces(piece_bytes: int) -> None:
    async def test() -> None:
        script = Script()
        tokens = await script.prefixes().import_prefix(PREFIX, pieces_of(DATA, piece_bytes))
        assert tokens == 300
        assert bytes(script.taken) == DATA
        assert script.asked[0] == {
            "operation": "kv_begin",
            "head": {**HEAD, "tag": TAG, "caller": CALLER},
        }
        assert script.operations[-1] == "kv_commit"
        assert set(script.operations[1:-1]) == {"kv_data"}

    run(test)


async def breaking(error: Exception) -> AsyncGenerator[bytes, None]:
    yield DATA[:PIECE_BYTES]
    raise error


class Stop(Failed):
    """Raised by whoever gives the bytes."""


def test_what_the_bytes_raise_is_passed_on_and_nothing_is_kept() -> None:
    async def test() -> None:
        script = Script()
        with pytest.raises(Stop):
            await script.prefixes().import_prefix(PREFIX, breaking(Stop("enough")))
        assert script.operations == ["kv_begin", "kv_data"]
        assert script.worker is not None
        assert script.worker.open_calls == [], "so the worker forgets it"

    run(test)


@pytest.mark.parametrize("operation", ["kv_begin", "kv_data", "kv_commit"])
def test_a_worker_that_refuses_ends_it(operation: str) -> None:
    async def test() -> None:
        script = Script(refuses=operation)
        with pytest.raises(Refused) as caught:
            await script.prefixes().import_prefix(PREFIX, pieces_of(DATA, 1 << 20))
        assert caught.value.code == "no_room"
        assert script.operations[-1] == operation
        assert script.worker is not None
        assert script.worker.open_calls == []

    run(test)


def test_one_who_leaves_in_the_middle_takes_it_back() -> None:
    async def test() -> None:
        script = Script()
        never = trio.Event()

        async def slow() -> AsyncGenerator[bytes, None]:
            yield DATA[:PIECE_BYTES]
            assert script.worker is not None
            assert "kv_begin" in script.worker.open_calls, "it stays open as long as it goes on"
            await never.wait()

        with trio.move_on_after(1.0):
            await script.prefixes().import_prefix(PREFIX, slow())
        assert script.operations == ["kv_begin", "kv_data"]
        assert script.worker is not None
        assert script.worker.open_calls == []

    run(test)


def test_a_worker_that_says_more_than_it_was_given_is_not_believed() -> None:
    async def test() -> None:
        head = replace(PREFIX, token_ids=bytes(4 * 100))
        assert await Script().prefixes().import_prefix(head, pieces_of(DATA, 1 << 20)) == 100

    run(test)
