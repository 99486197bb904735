"""Media of requests, read on a thread of their own: who gets what, and what is kept."""

import ctypes
import queue
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from meshd_plugins.builtin.llama.engine.media import embedding_of
from meshd_plugins.builtin.llama.worker.media import (
    WAITING_MAX,
    Embeddings,
    MediaReader,
)
from meshd_plugins.builtin.llama.worker.media_files import MediumUnusable
from meshd_plugins.builtin.llama.worker.mtmd import Encoded, Piece
from meshd_plugins.builtin.llama.worker.parts import EXIT_MEDIA

WAIT_S = 20
FAILS = """
from tests.unit.test_llama_media_reader import FakeEncoder, WAIT_S
from meshd_plugins.builtin.llama.worker.media import MediaReader
import threading
encoder = FakeEncoder()
encoder.encode = None
MediaReader(encoder, lambda: None, 100).begin(1, "ada", ["MQ=="])
threading.Event().wait(WAIT_S)
"""
ROW_BYTES = 4


class FakeEncoder:
    """A byte of a medium is a piece of so many embeddings; around each medium are tokens 1 and 2."""

    modalities = ("text", "image")
    threads = 1

    def __init__(self) -> None:
        self.encoded: list[bytes] = []
        self.may_encode = threading.Event()
        self.may_encode.set()
        self.began = threading.Event()
        self.at_once = False

    @contextmanager
    def read(self, data: bytes) -> Generator[list[Piece], None, None]:
        if not data:
            raise MediumUnusable("there is nothing in it")
        pieces = [
            Piece(key=data + bytes([n]), count=count, positions=count, at_once=self.at_once)
            for n, count in enumerate(data)
        ]
        yield [Piece((1,)), *pieces, Piece((2,))]

    def encode(self, piece: Piece) -> Encoded:
        self.began.set()
        assert self.may_encode.wait(WAIT_S)
        self.encoded.append(piece.key)
        return Encoded((ctypes.c_float * piece.count)(), ())


class Subject:
    def __init__(self) -> None:
        self.encoder = FakeEncoder()
        self._woken: queue.Queue[None] = queue.Queue()
        self.reader = MediaReader(self.encoder, lambda: self._woken.put(None), at_once_max=100)

    def read(self, call: int, *media: bytes, caller: str = "ada") -> tuple[tuple[int, ...], ...]:
        assert self.begin(call, *media, caller=caller)
        return self.next(call)

    def begin(self, call: int, *media: bytes, caller: str = "ada") -> bool:
        return self.reader.begin(call, caller, [b64encode(data).decode() for data in media])

    def next(self, call: int, wrong: str = "") -> tuple[tuple[int, ...], ...]:
        self.woken()
        [found] = self.reader.ready()
        assert (found.call, found.wrong) == (call, wrong)
        return found.tokens

    def woken(self) -> None:
        self._woken.get(timeout=WAIT_S)


@pytest.fixture
def subject() -> Subject:
    return Subject()


def keys(tokens: tuple[int, ...]) -> set[int]:
    return {embedding_of(token).key for token in tokens if token < 0}


def test_a_medium_becomes_its_tokens_and_what_stands_around_it(subject: Subject) -> None:
    first, second = subject.read(1, b"\x03\x02", b"\x01")
    assert (first[0], len(first), first[-1]) == (1, 1 + 3 + 2 + 1, 2)
    assert (second[0], len(second), second[-1]) == (1, 3, 2)
    for key in keys(first) | keys(second):
        assert subject.reader.embeddings[key].size_bytes % ROW_BYTES == 0


def test_what_is_encoded_is_kept_for_its_caller_only(subject: Subject) -> None:
    [mine] = subject.read(1, b"\x05")
    [again] = subject.read(2, b"\x05")
    [other] = subject.read(3, b"\x05", caller="bob")
    assert mine == again
    assert len(subject.encoder.encoded) == 2
    assert not keys(mine) & keys(other)


def test_one_that_cannot_be_read_says_why_and_the_next_one_is_read(subject: Subject) -> None:
    assert subject.begin(1, b"\x01", b"")
    subject.next(1, wrong="there is nothing in it")
    subject.encoder.at_once = True
    assert subject.begin(2, bytes([101]))
    subject.next(
        2, wrong="the picture takes 101 tokens at once, and a step of this model holds 100"
    )
    assert subject.read(3, bytes([100]))


def test_a_picture_comes_as_its_url(subject: Subject) -> None:
    assert subject.reader.begin(1, "ada", ["data:image/png;base64,BQ=="])
    assert subject.next(1) == subject.read(2, b"\x05")
    assert subject.reader.begin(3, "ada", ["data:image/png;base64,BQ=!"])
    subject.next(3, wrong="the picture or sound is not base64 as RFC 4648 has it")


def test_beyond_a_number_they_are_refused_and_cancelled_ones_are_not_encoded(
    subject: Subject,
) -> None:
    subject.encoder.may_encode.clear()
    assert subject.begin(0, b"\x01\x01")
    assert subject.encoder.began.wait(WAIT_S)
    for call in range(1, WAITING_MAX + 1):
        assert subject.begin(call, b"\x07")
    assert not subject.begin(99, b"\x07")
    for call in range(WAITING_MAX):
        subject.reader.cancel(call)
    subject.encoder.may_encode.set()
    for _ in range(WAITING_MAX):
        subject.woken()
    subject.next(WAITING_MAX)
    assert len(subject.encoder.encoded) == 2, "the one that had begun, and the one that was wanted"


def test_what_a_call_needs_stays_and_the_rest_is_bounded() -> None:
    kept = Embeddings(kept_bytes_max=100)
    for key in range(5):
        kept.put(key, Encoded((ctypes.c_float * 10)(), ()), call=key)
    for call in (0, 1, 2):
        kept.ended(call)
    found = []
    for key in range(5):
        try:
            found.append((key, kept[key].size_bytes))
        except KeyError:
            continue
    assert found == [(1, 40), (2, 40), (3, 40), (4, 40)], "of three that nobody needs two fit"
    assert kept.use(1, call=7)
    kept.ended(3)
    kept.ended(4)
    assert kept[1].size_bytes == 40
    assert not kept.use(2, call=8), "it was used longest ago"


def test_what_nobody_foresaw_ends_the_process_and_says_so() -> None:
    ended = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, check=False)
    assert ended.returncode == EXIT_MEDIA
    assert b"reading a picture or a sound failed" in ended.stderr
