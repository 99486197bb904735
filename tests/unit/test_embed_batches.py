"""Which texts go into which batch: nothing lost, order kept, budgets held, nobody starved."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from meshd_plugins.builtin.llama.worker.batches import BatchFormer, BatchLimits, Member

LIMITS = BatchLimits(tokens=64, texts=6)
LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=30)
quick = settings(max_examples=100, deadline=None)


def drained(former: BatchFormer) -> list[tuple[Member, ...]]:
    batches: list[tuple[Member, ...]] = []
    while former.busy:
        batches.append(former.take())
        assert batches[-1], "a busy former has a batch"
    assert former.take() == ()
    return batches


def check_budget(batch: tuple[Member, ...], limits: BatchLimits) -> None:
    assert len(batch) <= limits.texts
    assert len(batch) == 1 or sum(member.tokens for member in batch) <= limits.tokens


@quick
@given(st.lists(LENGTHS, max_size=8))
def test_every_text_is_in_one_batch_and_those_of_a_call_are_in_order(
    calls: list[list[int]],
) -> None:
    former = BatchFormer(LIMITS)
    for call, lengths in enumerate(calls):
        former.submit(call, lengths)
    batches = drained(former)
    for batch in batches:
        check_budget(batch, LIMITS)
    seen = [member for batch in batches for member in batch]
    for call, lengths in enumerate(calls):
        own = [member for member in seen if member.call == call]
        assert [member.text for member in own] == list(range(len(lengths)))
        assert [member.tokens for member in own] == lengths


@quick
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("submit"), LENGTHS),
            st.tuples(st.just("cancel"), st.integers(0, 20)),
            st.tuples(st.just("take"), st.none()),
        ),
        max_size=60,
    )
)
def test_whatever_the_order_of_what_happens(steps: list[tuple[str, object]]) -> None:
    former = BatchFormer(LIMITS)
    left: dict[int, list[tuple[int, int]]] = {}
    came = 0
    for step, what in steps:
        match step, what:
            case "submit", list(lengths):
                former.submit(came, lengths)
                left[came] = list(enumerate(lengths))
                came += 1
            case "cancel", int(call):
                former.cancel(call)
                left.pop(call, None)
            case _:
                batch = former.take()
                check_budget(batch, LIMITS)
                for member in batch:
                    assert left[member.call].pop(0) == (member.text, member.tokens)
                left = {call: texts for call, texts in left.items() if texts}
        assert former.busy == bool(left)
    for batch in drained(former):
        for member in batch:
            assert left[member.call].pop(0) == (member.text, member.tokens)
    assert not any(left.values())


@quick
@given(st.lists(LENGTHS, min_size=2, max_size=5))
def test_no_call_gets_ahead_of_another_that_waits(calls: list[list[int]]) -> None:
    former = BatchFormer(LIMITS)
    for call, lengths in enumerate(calls):
        former.submit(call, lengths)
    had = dict.fromkeys(range(len(calls)), 0)
    computed = dict.fromkeys(range(len(calls)), 0)
    longest = max(max(lengths) for lengths in calls)
    while former.busy:
        for member in former.take():
            had[member.call] += member.tokens
            computed[member.call] += 1
        waiting = [had[call] for call in had if computed[call] < len(calls[call])]
        if waiting:
            assert max(waiting) - min(waiting) <= LIMITS.tokens + longest


def test_a_small_call_does_not_wait_for_a_large_one() -> None:
    former = BatchFormer(LIMITS)
    former.submit(1, [16] * 1000)
    for _ in range(10):
        assert {member.call for member in former.take()} == {1}
    former.submit(2, [16, 16])
    assert [(m.call, m.text) for m in former.take()] == [(1, 40), (2, 0), (1, 41), (2, 1)]


def test_a_call_that_comes_later_is_owed_nothing_for_the_time_before() -> None:
    former = BatchFormer(LIMITS)
    former.submit(1, [32] * 20)
    for _ in range(5):
        former.take()
    former.submit(2, [32] * 20)
    for _ in range(8):
        assert sorted(member.call for member in former.take()) == [1, 2]


def test_a_text_that_is_longer_than_a_batch_goes_alone() -> None:
    former = BatchFormer(LIMITS)
    former.submit(1, [10, 500, 10])
    assert [[m.tokens for m in batch] for batch in drained(former)] == [[10], [500], [10]]


def test_a_gap_is_filled_by_others_and_the_one_that_made_it_is_next() -> None:
    former = BatchFormer(LIMITS)
    former.submit(1, [60, 60])
    former.submit(2, [4, 4, 4, 4])
    assert [(m.call, m.text) for m in former.take()] == [(1, 0), (2, 0)]
    assert former.take()[0][:2] == (2, 1)
    assert (1, 1) in [(m.call, m.text) for batch in drained(former) for m in batch]
