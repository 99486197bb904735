"""Soft state: the newest reading wins, its age is true, and it goes away by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd_cms.errors import InvalidKey, InvalidValue, ValueTooLarge
from meshd_cms.soft import SOFT_VALUE_BYTES_MAX, Reading, SoftConfig, SoftItem, SoftState
from meshd_cms.types import Epoch, NodeId

ME, PEER, OTHER = (NodeId(bytes([number]) * 16) for number in (1, 2, 3))
CONFIG = SoftConfig()


def item(sequence: int, epoch: int = 1, key: str = "load", age_s: float = 0.0) -> SoftItem:
    return SoftItem(PEER, Epoch(epoch), sequence, key, sequence, age_s)


def test_a_reading_is_sent_with_the_age_it_has_by_then() -> None:
    ours, theirs = SoftState(PEER, CONFIG), SoftState(ME, CONFIG)
    ours.publish("load", {"slots": 1}, Epoch(4), now_s=100.0)
    sent = ours.item(PEER, "load", now_s=102.0)
    assert sent == SoftItem(PEER, Epoch(4), 1, "load", {"slots": 1}, 2.0)
    assert theirs.observe(sent, now_s=1000.0)
    assert theirs.read(PEER, "load", 1003.0) == Reading({"slots": 1}, 5.0)
    assert theirs.items(PEER, 1003.0) == (replace(sent, age_s=5.0),)


def test_readings_expire_and_are_never_taken_too_old() -> None:
    table = SoftState(ME, CONFIG)
    assert not table.observe(item(1, age_s=CONFIG.expire_s), 0.0)
    assert table.observe(item(1, age_s=9.0), 0.0)
    assert table.expire(0.5) == ()
    assert table.read(PEER, "load", 1.0) is None
    assert table.item(PEER, "load", 1.0) is None
    assert table.expire(1.0) == ((PEER, "load"),)
    assert table.items(PEER, 1.0) == ()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=12))
def test_whatever_the_order_the_newest_reading_is_kept(arrivals: list[tuple[int, int]]) -> None:
    table = SoftState(ME, CONFIG)
    for count, (epoch, sequence) in enumerate(arrivals):
        newest = max(arrivals[:count], default=(0, 0))
        assert table.observe(item(sequence, epoch), 0.0) == ((epoch, sequence) > newest)
    (held,) = table.items(PEER, 0.0)
    assert (held.epoch, held.sequence) == max(arrivals)


def test_a_new_life_drops_the_readings_of_the_old() -> None:
    table = SoftState(ME, CONFIG)
    table.observe(item(8, key="task/1"), 0.0)
    table.observe(item(9), 0.0)
    assert table.observe(item(1, epoch=2), 0.0)
    assert [one.key for one in table.items(PEER, 0.0)] == ["load"]
    assert not table.observe(item(10, key="task/1"), 0.0)


def test_bounds() -> None:
    table = SoftState(ME, SoftConfig(owners_max=1, keys_per_owner_max=2))
    for number, key in enumerate(["a", "b"], start=1):
        assert table.observe(item(number, key=key), 0.0)
    assert not table.observe(item(3, key="c"), 0.0)
    assert not table.observe(replace(item(1), owner=OTHER), 0.0)
    table.forget(PEER)
    assert table.observe(replace(item(1), owner=OTHER), 0.0)


def test_our_own_readings_come_from_publish_alone_and_the_oldest_makes_room() -> None:
    table = SoftState(ME, SoftConfig(keys_per_owner_max=2))
    for key in ("a", "b", "a", "c"):
        table.publish(key, 1, Epoch(1), 0.0)
    assert [one.key for one in table.items(ME, 0.0)] == ["a", "c"]
    assert not table.observe(replace(item(99, key="a"), owner=ME), 0.0)


def test_what_cannot_be_published() -> None:
    table = SoftState(ME, CONFIG)
    with pytest.raises(ValueTooLarge):
        table.publish("load", b"x" * SOFT_VALUE_BYTES_MAX, Epoch(1), 0.0)
    with pytest.raises(InvalidKey):
        table.publish("", 1, Epoch(1), 0.0)
    with pytest.raises(InvalidValue):
        table.publish("load", 2**64, Epoch(1), 0.0)
    assert table.items(ME, 0.0) == ()


def test_a_reading_that_still_holds_stays_and_never_gets_older_by_it() -> None:
    table = SoftState(ME, CONFIG)
    table.observe(item(4), 0.0)
    assert table.renew(PEER, Epoch(1), 4, age_s=2.0, now_s=9.0) == "load"
    assert table.read(PEER, "load", 12.0) == Reading(4, 5.0)
    assert table.renew(PEER, Epoch(1), 4, age_s=9.0, now_s=9.0) == "load"  # a late one
    assert table.read(PEER, "load", 12.0) == Reading(4, 5.0)


@pytest.mark.parametrize(
    ("owner", "epoch", "sequence"), [(OTHER, 1, 4), (PEER, 2, 4), (PEER, 1, 3), (PEER, 1, 5)]
)
def test_what_is_not_held_is_not_renewed(owner: NodeId, epoch: int, sequence: int) -> None:
    table = SoftState(ME, CONFIG)
    table.observe(item(4), 0.0)
    assert table.renew(owner, Epoch(epoch), sequence, 0.0, 5.0) is None
    assert table.read(PEER, "load", 6.0) == Reading(4, 6.0)
