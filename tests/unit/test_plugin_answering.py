"""How the items of a worker become the events of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing

import pytest
import trio

from meshd_plugins.answering import answer_of, count_in
from meshd_plugins.api import Chunk, Done, Event, Failed, Usage, Value, WorkerSpec
from meshd_plugins.testing import FakeWorker

Item = Mapping[str, Value]


def chunk(item: Item) -> Chunk:
    if "text" not in item:
        raise Failed("no text")
    return Chunk(str(item["text"]))


def done(item: Item) -> Done:
    return Done(usage=Usage(completion_tokens=count_in(item, "tokens")))


def rolling(*replies: Item) -> FakeWorker:
    def script(message: Item, /) -> Sequence[Item]:
        assert message == {"sides": 6}
        return replies

    return FakeWorker(WorkerSpec("fake", ()), script, {})


async def events(worker: FakeWorker) -> list[Event]:
    async with aclosing(answer_of(worker, {"sides": 6}, chunk, done)) as found:
        return [event async for event in found]


def test_items_become_chunks_and_the_last_one_the_end_of_the_answer() -> None:
    worker = rolling({"text": "3"}, {"text": "5"}, {"done": {"tokens": 2}}, {"text": "late"})
    found = trio.run(events, worker)
    assert found == [Chunk("3"), Chunk("5"), Done(usage=Usage(completion_tokens=2))]
    assert worker.open_calls == []


@pytest.mark.parametrize("replies", [[], [{"text": "3"}], [{"text": "3"}, {"done": True}], [{}]])
def test_an_answer_that_is_none_is_a_failure(replies: list[Item]) -> None:
    worker = rolling(*replies)
    with pytest.raises(Failed):
        trio.run(events, worker)
    assert worker.open_calls == []


def test_who_leaves_early_ends_the_call() -> None:
    worker = rolling({"text": "3"}, {"text": "5"}, {"done": {}})

    async def first() -> None:
        async with aclosing(answer_of(worker, {"sides": 6}, chunk, done)) as found:
            assert await anext(found) == Chunk("3")
            assert len(worker.open_calls) == 1
        assert worker.open_calls == []

    trio.run(first)


@pytest.mark.parametrize("said", [True, -1, 2.0, "2", None])
def test_what_is_no_count_counts_as_none(said: Value) -> None:
    assert count_in({"tokens": said}, "tokens") == 0
    assert count_in({"tokens": 2}, "tokens") == 2
