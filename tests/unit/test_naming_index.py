"""The index: what is put is found, what is discarded is gone, whatever the order."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_naming import index_of, node, offer

from meshd_naming import Index, Offer, parse_query
from meshd_naming.index import OFFERS_PER_OWNER_MAX

PATHS = ("data.gpt/a", "data.gpt/a/b", "data.gpt/a/b/c", "data.gpt/x/b", "knowledge.gpt/a")


def matches(labels: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """The definition of wildcards, written the slow way."""
    if not pattern:
        return not labels
    if pattern[0] == "**":
        return True
    return bool(labels) and pattern[0] in ("*", labels[0]) and matches(labels[1:], pattern[1:])


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(PATHS)), max_size=20),
    st.lists(st.sampled_from(("a", "b", "x", "*")), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_lookup_finds_what_the_pattern_says_in_any_order_of_arrival(
    puts: list[tuple[int, str]], labels: list[str], rest: bool, seed: int
) -> None:
    query = parse_query(f"data.gpt/{'/'.join(labels)}{'/**' if rest else ''}")
    offers = {(number, path): offer(number, path) for number, path in puts}
    expected = {
        key
        for key, one in offers.items()
        if one.name.kind is query.kind and matches(one.name.labels, query.labels)
    }
    index = index_of(*offers.values())
    shuffled = list(offers.values())
    Random(seed).shuffle(shuffled)
    found = index.lookup(query)
    assert {(int.from_bytes(one.owner, "big"), one.name.path) for one in found} == expected
    assert index_of(*shuffled).lookup(query) == found


def test_put_replaces_what_has_the_same_owner_and_id() -> None:
    index = index_of(offer(1, "data.gpt/a", slots=1))
    before = index.generation
    assert index.put(offer(1, "data.gpt/a", slots=1))
    assert index.generation == before, "the same again is no change"
    assert index.put(offer(1, "data.gpt/a", slots=2))
    assert index.generation > before
    assert [one.slots for one in index.offers()] == [2]
    assert len(index) == 1


def test_discard_leaves_no_trace() -> None:
    index = index_of(offer(1, "data.gpt/a/b"), offer(1, "data.gpt/a"), offer(2, "data.gpt/a/b"))
    assert index.discard(node(1), "data.gpt/a/b")
    assert not index.discard(node(1), "data.gpt/a/b")
    assert index.discard_owner(node(2)) == 1
    assert index.paths() == (("data.gpt/a", ("a",)),)
    assert index.discard_owner(node(1)) == 1
    assert (len(index), tuple(index.offers()), index.paths()) == (0, (), ())
    assert dict(index.confirmed_s) == {}
    assert index.lookup(parse_query("data.gpt/**")) == ()


def test_an_owner_cannot_fill_the_index() -> None:
    index = Index()

    def numbered(number: int) -> Offer:
        return offer(1, f"data.gpt/n{number}")

    assert all(index.put(numbered(number)) for number in range(OFFERS_PER_OWNER_MAX))
    assert not index.put(numbered(OFFERS_PER_OWNER_MAX))
    assert index.put(offer(1, "data.gpt/n0", slots=9)), "a replacement takes no more room"
    assert len(index) == OFFERS_PER_OWNER_MAX


def test_confirming_a_record_makes_it_young_and_never_older() -> None:
    index = index_of(offer(1, "data.gpt/a", updated_at_s=5.0))
    generation = index.generation
    index.confirm(node(1), 9.0)
    index.confirm(node(1), 7.0)
    index.confirm(node(2), 7.0)
    assert dict(index.confirmed_s) == {node(1): 9.0}
    assert index.generation == generation
