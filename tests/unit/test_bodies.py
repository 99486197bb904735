"""The bound on what large requests hold together."""

from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.core.bodies import BODY_BYTES_FREE, Bodies

FREE = BODY_BYTES_FREE


def test_small_bodies_are_not_counted_and_large_ones_are_until_they_are_done() -> None:
    bodies = Bodies(1000)
    small, first, second = bodies.share(), bodies.share(), bodies.share()
    assert small.grow(FREE)
    assert first.grow(FREE + 400)
    assert first.grow(FREE + 600)
    assert not second.grow(FREE + 401)
    assert second.grow(FREE + 400)
    assert bodies.held_bytes == 1000
    first.release()
    first.release()
    assert bodies.held_bytes == 400
    assert second.grow(FREE + 1000)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, FREE + 900) | st.just(-1)), max_size=60)
)
def test_what_is_held_is_what_was_taken_and_within_the_bound(steps: list[tuple[int, int]]) -> None:
    bodies = Bodies(1000)
    shares = [bodies.share() for _ in range(5)]
    held = [0] * 5
    for who, size in steps:
        if size < 0:
            shares[who].release()
            held[who] = 0
        elif shares[who].grow(size):
            held[who] = max(held[who], size - FREE, 0)
        else:
            assert sum(held) - held[who] + size - FREE > 1000
        assert bodies.held_bytes == sum(held) <= 1000
