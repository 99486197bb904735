"""The worker's part that hands sequences over: what it holds for it is bounded, counted and let go."""

from __future__ import annotations

import array
import hashlib
from dataclasses import dataclass, field

from tests.e2e.support_sequences import RecordingLink
from tests.shell.support_handoff_flow import CALLER, TAG, handing, kept_state, written

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.worker.handoff import (
    EXPORT_IDLE_S,
    EXPORTS_MAX,
    IMPORT_S,
    READ_BYTES_MAX,
)
from meshd_plugins.builtin.llama.worker.kv_layout import Layout

SMALL = Layout(magic=1, streams=1, words=bytes(8), rows=((1, 256), (1, 256)))
TOKENS = 20
STATE = bytes(written(SMALL, TOKENS))[len(SMALL.frame()[0]) :]
HEAD: dict[str, Value] = {
    "tokens": array.array("i", range(TOKENS)).tobytes(),
    "bytes": len(STATE),
    "hash": hashlib.blake2b(STATE, digest_size=32).digest(),
    "caller": CALLER,
    "privacy": 1,
    "tag": TAG,
}
EXPORT: dict[str, Value] = {"operation": "kv_export", "tag": TAG, "caller": CALLER}
KEPT_BYTES = len(written(SMALL, TOKENS))


@dataclass
class Scene:
    """A part, its clock, and what it said."""

    room: int = 2 * KEPT_BYTES
    now_s: float = 0.0
    calls: int = 0
    link: RecordingLink = field(default_factory=RecordingLink)

    def __post_init__(self) -> None:
        self.part, self.engine = handing(self.link, SMALL, self.room, lambda: self.now_s)

    def keep(self) -> None:
        assert self.engine.adopt(kept_state(SMALL, TOKENS))

    def ask(self, message: dict[str, Value]) -> dict[str, Value] | tuple[str, str]:
        """The item that came, or the error."""
        self.calls += 1
        self.part.take(self.calls, message)
        if self.calls in self.link.errors:
            return self.link.errors[self.calls]
        items = self.link.items.get(self.calls, [])
        return dict(items[0]) if items else {}

    def begin(self) -> int:
        answer = self.ask({"operation": "kv_begin", "head": HEAD})
        assert isinstance(answer, dict), answer
        number = answer["import"]
        assert isinstance(number, int)
        return number


def read(at: Value, size: Value, export: Value = 1) -> dict[str, Value]:
    return {"operation": "kv_read", "export": export, "at": at, "bytes": size}


def test_what_is_read_is_what_is_there() -> None:
    scene = Scene()
    scene.keep()
    answer = scene.ask(EXPORT)
    assert isinstance(answer, dict)
    assert answer["export"] == 1
    assert scene.link.ended == set(), "it stays open: the daemon leaves when it has enough"
    for at, size in ((0, len(STATE)), (0, 1), (len(STATE) - 1, 1), (100, 200)):
        assert scene.ask(read(at, size)) == {"data": STATE[at : at + size]}
    assert len(scene.link.ended) == 4


def test_what_is_not_there_is_not_read() -> None:
    scene = Scene(room=3 * READ_BYTES_MAX)
    scene.keep()
    scene.ask(EXPORT)
    for at, size in (
        (0, 0),
        (0, -1),
        (-1, 1),
        (0, len(STATE) + 1),
        (len(STATE), 1),
        (0, 2**62),
        (None, 1),
        (0, "all"),
    ):
        assert scene.ask(read(at, size)) == ("refused", "size")
    for number in (0, 2, None, "1"):
        assert scene.ask(read(0, 1, number)) == ("refused", "not_here")


def test_an_export_is_held_until_it_is_left_even_when_it_is_kept_no_longer() -> None:
    scene = Scene()
    scene.keep()
    scene.ask(EXPORT)
    export = scene.calls
    assert (scene.engine.kept_bytes, scene.engine.room_bytes) == (KEPT_BYTES, KEPT_BYTES)
    longer = kept_state(SMALL, TOKENS + 1, b"tag-0002")
    assert not scene.engine.adopt(longer), "there is room for one more of its size only"
    assert scene.ask(read(0, 4)) == {"data": STATE[:4]}
    scene.part.cancel(export)
    assert scene.ask(read(0, 4)) == ("refused", "not_here")
    assert scene.engine.room_bytes == scene.room
    assert scene.engine.adopt(longer)


def test_only_so_many_are_handed_out_at_once() -> None:
    scene = Scene(room=10 * KEPT_BYTES)
    scene.keep()
    for _ in range(EXPORTS_MAX):
        assert isinstance(scene.ask(EXPORT), dict)
    assert scene.ask(EXPORT) == ("refused", "busy")
    scene.part.cancel(1)
    assert isinstance(scene.ask(EXPORT), dict)


def test_an_export_of_which_nothing_is_read_is_let_go() -> None:
    scene = Scene()
    scene.keep()
    scene.ask(EXPORT)
    scene.now_s = EXPORT_IDLE_S
    scene.part.step()
    assert isinstance(scene.ask(read(0, 4)), dict), "it is just in time"
    scene.now_s += EXPORT_IDLE_S + 1
    scene.part.step()
    assert scene.link.errors == {1: ("failed", "failed")}
    assert scene.ask(read(0, 4)) == ("refused", "not_here")
    assert scene.engine.room_bytes == scene.room


def test_what_comes_in_is_counted_before_its_first_byte_and_let_go_when_it_does_not_end() -> None:
    scene = Scene()
    scene.begin()
    assert scene.engine.kept_bytes == KEPT_BYTES
    scene.begin()
    assert scene.engine.room_bytes == 0
    scene.part.cancel(scene.calls)  # whoever gave it has left
    assert scene.engine.room_bytes == KEPT_BYTES
    scene.now_s = IMPORT_S + 1
    scene.part.step()
    assert scene.engine.room_bytes == scene.room
    assert scene.engine.kept_bytes == 0


def test_what_does_not_fit_beside_what_is_on_its_way_is_refused() -> None:
    scene = Scene(room=KEPT_BYTES + 1)
    scene.begin()
    assert scene.ask({"operation": "kv_begin", "head": HEAD}) == ("refused", "no_room")


def test_what_came_whole_is_kept_and_counts_once() -> None:
    scene = Scene(room=KEPT_BYTES)
    number = scene.begin()
    for at in range(0, len(STATE), 1000):
        data = STATE[at : at + 1000]
        scene.ask({"operation": "kv_data", "import": number, "data": data})
    assert scene.ask({"operation": "kv_commit", "import": number}) == {"tokens": TOKENS}
    assert scene.engine.kept_bytes == KEPT_BYTES
    answer = scene.ask(EXPORT)
    assert isinstance(answer, dict)
    head = answer["head"]
    assert isinstance(head, dict)
    assert {name: head[name] for name in ("tokens", "bytes", "hash", "privacy")} == {
        name: HEAD[name] for name in ("tokens", "bytes", "hash", "privacy")
    }
