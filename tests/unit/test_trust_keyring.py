"""The key ring: a change of keys loses nobody who is in time, and a revoked node's key is soon worth nothing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.core.decrees import Decree, DecreeKind
from meshd.trust.keyring import (
    FADE_REVOKED_S,
    FADE_S,
    HURRY_S,
    KEYS_KEPT,
    SEAL_AFTER_S,
    DatagramKey,
    KeyRing,
)
from meshd_cms.types import NodeId

FIRST, SECOND, THIRD = (DatagramKey(number, bytes([number]) * 32) for number in range(3))


def decree(key: DatagramKey) -> Decree:
    return Decree(
        DecreeKind.KEY_GENERATION,
        NodeId(b"a" * 16),
        1,
        0.0,
        b"raw",
        generation=key.generation,
        commitment=key.commitment,
    )


def test_a_new_key_opens_at_once_seals_a_moment_later_and_the_old_one_fades() -> None:
    ring = KeyRing([FIRST])
    ring.decreed(decree(SECOND), 100.0)
    assert ring.wanted == decree(SECOND)
    assert ring.opening == (FIRST.key,)
    assert ring.add(SECOND.key, 100.0)
    assert ring.wanted is None
    assert (ring.current, ring.opening) == (FIRST, (FIRST.key, SECOND.key))
    assert not ring.advance(100.0 + SEAL_AFTER_S - 0.01)
    assert ring.deadline_s == 100.0 + SEAL_AFTER_S
    assert ring.advance(100.0 + SEAL_AFTER_S)
    assert (ring.current, ring.opening) == (SECOND, (SECOND.key, FIRST.key))
    assert ring.deadline_s == 100.0 + SEAL_AFTER_S + FADE_S
    assert ring.advance(100.0 + SEAL_AFTER_S + FADE_S)
    assert ring.opening == (SECOND.key,)


def test_after_a_revocation_the_old_key_fades_faster() -> None:
    ring = KeyRing([FIRST])
    ring.revoked(100.0)
    ring.hold(SECOND)
    ring.decreed(decree(SECOND), 100.0)
    ring.advance(101.0)
    assert not ring.advance(101.0 + FADE_REVOKED_S - 0.01)
    assert ring.advance(101.0 + FADE_REVOKED_S)
    assert ring.opening == (SECOND.key,)


def test_a_revocation_hurries_a_key_that_fades_already_and_none_long_after() -> None:
    ring = KeyRing([FIRST, SECOND])
    ring.decreed(decree(SECOND), 100.0)
    ring.advance(101.0)
    ring.revoked(102.0)
    assert ring.deadline_s == 102.0 + FADE_REVOKED_S
    ring.advance(110.0)
    ring.hold(THIRD)
    ring.decreed(decree(THIRD), 102.0 + HURRY_S)
    ring.advance(103.0 + HURRY_S)
    assert ring.deadline_s == 103.0 + HURRY_S + FADE_S


def test_a_key_that_no_decree_names_is_not_taken() -> None:
    ring = KeyRing([FIRST])
    assert not ring.add(SECOND.key, 0.0)
    ring.decreed(decree(SECOND), 0.0)
    assert not ring.add(THIRD.key, 0.0)
    assert not ring.add(b"short", 0.0)
    assert ring.opening == (FIRST.key,)


def test_a_start_takes_what_is_in_force_or_else_the_latest_that_can_have_been() -> None:
    assert KeyRing([FIRST, SECOND, THIRD]).current == FIRST
    assert KeyRing([FIRST, SECOND, THIRD], decree(SECOND)).current == SECOND
    behind = KeyRing([FIRST, SECOND], decree(THIRD))
    assert (behind.current, behind.wanted) == (SECOND, decree(THIRD))
    never_decreed = DatagramKey(2, b"?" * 32)
    assert KeyRing([FIRST, SECOND, never_decreed], decree(THIRD)).current == SECOND


def test_a_decree_that_turns_out_void_brings_the_key_before_it_back() -> None:
    ring = KeyRing([FIRST, SECOND])
    ring.decreed(decree(SECOND), 0.0)
    ring.advance(1.0)
    ring.decreed(decree(FIRST), 2.0)
    assert ring.advance(2.0 + SEAL_AFTER_S)
    assert ring.current == FIRST
    assert SECOND.key in ring.opening


def test_no_key_is_in_what_it_shows() -> None:
    assert FIRST.key.hex() not in repr(FIRST)
    assert repr(FIRST.key) not in repr(FIRST)
    assert FIRST.fingerprint != SECOND.fingerprint


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.floats(0.0, 60.0)), max_size=30))
def test_the_ring_is_bounded_and_always_opens_what_it_seals(
    changes: list[tuple[int, float]],
) -> None:
    keys = [DatagramKey(number, bytes([number]) * 32) for number in range(8)]
    ring, now_s = KeyRing(keys[:1]), 0.0
    for number, pause_s in changes:
        ring.decreed(decree(keys[number]), now_s)
        if ring.wanted is not None:
            assert ring.add(keys[number].key, now_s)
        now_s += pause_s
        ring.advance(now_s)
        assert ring.current.key == ring.opening[0]
        assert ring.deadline_s > now_s or ring.deadline_s == float("inf")
    ring.advance(now_s + SEAL_AFTER_S)
    ring.advance(now_s + SEAL_AFTER_S + FADE_S)
    assert len(ring.opening) == 1
    assert len(ring.held()) <= KEYS_KEPT + 1
    if changes:
        assert ring.current == keys[changes[-1][0]]
