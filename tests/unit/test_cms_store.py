"""A store: our own record, reading, what is offered and asked, parking, epochs, ages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_cms import (
    EVERYTHING,
    CountingVerifier,
    over_the_wire,
    rumour,
    signer,
    store,
    whole,
)

from meshd_cms.codec import delta_size_bytes, pack_delta
from meshd_cms.errors import InvalidKey, InvalidValue, RecordFull, ValueTooLarge
from meshd_cms.packing import pack
from meshd_cms.store import Store
from meshd_cms.types import (
    COUNTER_MAX,
    ENTRIES_MAX,
    ENTRY_BYTES_MAX,
    EPOCH_MAX,
    HEAD_BYTES_MAX,
    KEY_BYTES_MAX,
    RUMOUR_BYTES_MAX,
    VALUE_DEPTH_MAX,
    Applied,
    Delta,
    DigestLine,
    Epoch,
    Known,
    OwnEpochSeen,
    Parked,
    Rejected,
    RejectReason,
    StoreConfig,
    Value,
    Version,
    node_id_of,
    node_id_parse,
    node_id_short,
    node_id_text,
)


def test_a_write_is_read_back_and_its_rumour_names_the_version_before() -> None:
    one = store(0)
    first = rumour(one.set("node", {"name": "pi", "zone": "lab"}))
    second = rumour(one.set("hw", [1, 2.5, None, b"x", True]))
    assert (first.since, first.until, second.since, second.until) == (0, 1, 1, 2)
    assert one.get(one.owner, "node") == {"name": "pi", "zone": "lab"}
    assert one.items(one.owner) == (
        ("hw", [1, 2.5, None, b"x", True]),
        ("node", {"name": "pi", "zone": "lab"}),
    )
    assert one.items(one.owner, "h") == (("hw", [1, 2.5, None, b"x", True]),)
    assert one.line(one.owner) == DigestLine(one.owner, Epoch(1), Version(2), Version(0))


def test_an_unchanged_value_is_no_write_whatever_the_order_of_its_map() -> None:
    one = store(0)
    one.set("k", {"a": 1, "b": {"c": 2, "d": 3}})
    assert one.set("k", {"b": {"d": 3, "c": 2}, "a": 1}) is None
    assert one.set("k", {"b": {"d": 3, "c": 2}, "a": 1.0}) is not None  # 1.0 is another value


def test_deleting_what_is_not_there_is_no_write() -> None:
    one = store(0)
    assert one.delete("k") is None
    one.set("k", 1)
    assert one.delete("k") is not None
    assert one.delete("k") is None
    assert one.get(one.owner, "k") is None
    assert one.items(one.owner) == ()


def test_a_value_too_large_names_key_size_and_limit_and_changes_nothing() -> None:
    one = store(0)
    one.set("k", "small")
    before = one.line(one.owner)
    with pytest.raises(ValueTooLarge, match="'k'") as caught:
        one.set("k", "x" * ENTRY_BYTES_MAX)
    assert caught.value.limit_bytes == ENTRY_BYTES_MAX
    assert caught.value.size_bytes > ENTRY_BYTES_MAX
    assert (one.get(one.owner, "k"), one.line(one.owner)) == ("small", before)


def test_the_largest_entry_fits_a_rumour_of_the_stated_size() -> None:
    one = store(0, EPOCH_MAX)
    size = ENTRY_BYTES_MAX
    delta = None
    while delta is None:
        try:
            delta = one.set("k" * KEY_BYTES_MAX, b"x" * size)
        except ValueTooLarge as error:
            size -= error.size_bytes - error.limit_bytes
    assert delta_size_bytes(delta) <= RUMOUR_BYTES_MAX
    # The head's bound with every counter at its largest.
    wire = list(pack_delta(delta))
    wire[1] = wire[2] = wire[3] = wire[6] = wire[7] = COUNTER_MAX
    wire[8] = [None] * ENTRIES_MAX
    assert len(pack(wire)) - ENTRIES_MAX == HEAD_BYTES_MAX
    with pytest.raises(ValueTooLarge):
        one.set("k" * KEY_BYTES_MAX, b"x" * (size + 1))


@pytest.mark.parametrize("key", ["", "k" * (KEY_BYTES_MAX + 1), "\ud800", "ä" * 65])
def test_bad_keys(key: str) -> None:
    with pytest.raises(InvalidKey):
        store(0).set(key, 1)


def nested(depth: int) -> Value:
    value: Value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud800", nested(VALUE_DEPTH_MAX + 1)])
def test_bad_values(value: Value) -> None:
    one = store(0)
    with pytest.raises(InvalidValue):
        one.set("k", value)
    assert one.owners() == ()
    assert one.set("k", nested(VALUE_DEPTH_MAX)) is not None


def test_values_of_foreign_types_are_named() -> None:
    with pytest.raises(InvalidValue, match="set"):
        store(0).set("k", {"a": {1, 2}})  # type: ignore[dict-item]
    with pytest.raises(InvalidValue, match="strings"):
        store(0).set("k", {1: 2})  # type: ignore[dict-item]


def test_a_record_is_bounded_and_collecting_tombstones_makes_room() -> None:
    one = store(0)
    for number in range(ENTRIES_MAX):
        one.set(f"k{number}", number)
    with pytest.raises(RecordFull):
        one.set("one more", 1)
    assert one.set("k0", "an old key can still be written") is not None
    one.delete("k1")
    with pytest.raises(RecordFull):
        one.set("one more", 1)
    one.collect_tombstones(0)
    assert one.set("one more", 1) is not None


def test_a_gap_parks_and_what_was_parked_is_applied_when_it_closes() -> None:
    owner, peer = store(0), store(1)
    deltas = [rumour(owner.set(key, key)) for key in "abcd"]
    assert peer.apply(deltas[3], 0.0) == Parked(owner.owner, Version(0))
    assert peer.apply(deltas[2], 0.0) == Parked(owner.owner, Version(0))
    assert peer.apply(deltas[0], 0.0) == Applied(owner.owner, ("a",), reset=False)
    assert peer.apply(deltas[3], 0.0) == Parked(owner.owner, Version(1))
    assert peer.apply(deltas[1], 7.0) == Applied(owner.owner, ("b", "c", "d"), reset=False)
    assert peer.items(owner.owner) == owner.items(owner.owner)
    assert peer.updated_at_s(owner.owner) == 7.0


def until(deltas: list[Delta], count: int) -> Delta:
    """The first of an owner's one-entry deltas as one."""
    entries = tuple(entry for delta in deltas[:count] for entry in delta.entries)
    return replace(deltas[count - 1], since=Version(0), entries=entries)


def reached(one: Store, delta: Delta) -> int:
    one.apply(delta, 0.0)
    line = one.line(delta.owner)
    assert line is not None
    return line.max_version


def test_parking_is_bounded_for_an_owner_the_newest_are_kept() -> None:
    owner = store(0)
    peer = store(1, config=StoreConfig(parked_per_owner_max=2))
    deltas = [rumour(owner.set(key, key)) for key in "abcdef"]
    for delta in deltas[1:]:
        assert peer.apply(delta, 0.0) == Parked(owner.owner, Version(0))
    assert reached(peer, until(deltas, 2)) == 2
    assert reached(peer, until(deltas, 4)) == 6


def test_parking_is_bounded_over_all_owners_and_by_length() -> None:
    peer = store(9, config=StoreConfig(parked_max=1, parked_entries_max=1))
    first, second, third = (
        [rumour(one.set(key, key)) for key in "abcd"] for one in (store(0), store(1), store(2))
    )
    for deltas in (first, second):
        assert isinstance(peer.apply(deltas[3], 0.0), Parked)
    long = replace(third[3], since=Version(1), entries=tuple(d.entries[0] for d in third[1:]))
    assert isinstance(peer.apply(long, 0.0), Parked)  # asked for, but not kept
    assert reached(peer, until(first, 3)) == 3
    assert reached(peer, until(second, 3)) == 4
    assert reached(peer, until(third, 1)) == 1


def test_a_forged_delta_is_never_parked() -> None:
    owner, peer = store(0), store(1)
    owner.set("a", 1)
    delta = rumour(owner.set("b", 1))
    forged = replace(delta, head=replace(delta.head, signature=bytes(64)))
    bad = Rejected(owner.owner, RejectReason.BAD_HEAD_SIGNATURE)
    assert peer.apply(forged, 0.0) == bad


def test_a_new_life_replaces_the_record_as_a_whole() -> None:
    old, peer = store(0, 5), store(1)
    old.set("kept", 1)
    old.set("lost", 1)
    old.set("changed", 1)
    peer.apply(whole(old, old.owner), 0.0)
    new = store(0, 6)
    new.set("kept", 1)
    new.set("changed", 2)
    later = rumour(new.set("new", 1))
    assert peer.apply(later, 0.0) == Parked(old.owner, Version(0))
    result = peer.apply(whole(new, new.owner), 0.0)
    assert result == Applied(old.owner, ("changed", "lost", "new"), reset=True)
    assert peer.items(old.owner) == new.items(new.owner)
    stale = Rejected(old.owner, RejectReason.STALE_EPOCH)
    assert peer.apply(rumour(old.set("late", 1)), 0.0) == stale


def test_no_delta_ever_writes_our_own_record() -> None:
    old = store(0, 9)
    old.set("a", "of an earlier life")
    new = store(0, 3)
    assert new.apply(whole(old, old.owner), 0.0) == OwnEpochSeen(Epoch(9))
    assert new.owners() == ()
    new.set("a", "mine")
    new.set("gone", 1)
    new.delete("gone")
    new.set("b", 2)
    assert new.apply(whole(old, old.owner), 0.0) == OwnEpochSeen(Epoch(9))
    assert new.items(new.owner) == (("a", "mine"), ("b", 2))
    assert new.learn_epoch(Epoch(9))
    assert new.epoch == 10
    assert new.line(new.owner) == DigestLine(new.owner, Epoch(10), Version(2), Version(0))
    peer = store(1)
    peer.apply(whole(old, old.owner), 0.0)
    assert peer.apply(whole(new, new.owner), 0.0) == Applied(new.owner, ("a", "b"), reset=True)
    stale = Rejected(new.owner, RejectReason.STALE_EPOCH)
    assert new.apply(whole(old, old.owner), 0.0) == stale


def test_only_our_signature_makes_us_take_another_epoch() -> None:
    old, new = store(0, 9), store(0, 3)
    delta = rumour(old.set("a", 1))
    forged = replace(delta, head=replace(delta.head, signature=bytes(64)))
    bad = Rejected(new.owner, RejectReason.BAD_HEAD_SIGNATURE)
    assert new.apply(forged, 0.0) == bad


def test_learning_an_epoch_that_is_not_above_ours_changes_nothing() -> None:
    one = store(0, 5)
    one.set("a", 1)
    before = one.line(one.owner)
    assert not one.learn_epoch(Epoch(4))
    assert not one.learn_epoch(Epoch(5))
    assert not one.learn_epoch(Epoch(EPOCH_MAX))
    assert (one.epoch, one.line(one.owner)) == (5, before)


def test_another_life_of_the_very_same_epoch_is_noticed() -> None:
    twin, one = store(0, 5), store(0, 5)
    one.set("a", "ours")
    assert one.apply(rumour(twin.set("a", "theirs")), 0.0) == OwnEpochSeen(Epoch(5))
    assert one.learn_epoch(Epoch(5))
    assert one.epoch == 6
    assert not one.learn_epoch(Epoch(5))
    assert one.get(one.owner, "a") == "ours"


def test_our_own_rumour_coming_back_is_known() -> None:
    one = store(0)
    first = rumour(one.set("a", 1))
    assert one.apply(first, 0.0) == Known(one.owner)
    second = rumour(one.set("a", 2))
    assert one.apply(second, 0.0) == Known(one.owner)
    assert one.apply(first, 0.0) == Known(one.owner)


def test_repetitions_cost_no_verification() -> None:
    verify = CountingVerifier()
    owner, peer = store(0), store(1, verify=verify)
    deltas = [rumour(owner.set(key, key)) for key in "abc"]
    for delta in deltas:
        peer.apply(delta, 0.0)
    assert verify.calls == 6  # a head and an entry each
    for delta in deltas:
        assert peer.apply(delta, 0.0) == Known(owner.owner)
    assert verify.calls == 6
    last = rumour(owner.set("d", 1))
    peer.apply(whole(owner, owner.owner), 0.0)  # overlaps what is held by three entries
    assert verify.calls == 8
    assert peer.apply(last, 0.0) == Known(owner.owner)


def test_wants_and_deltas_agree_on_who_lacks_what() -> None:
    one, other = store(0), store(1)
    third = store(2)
    third.set("k", 1)
    one.apply(whole(third, third.owner), 0.0)
    one.set("k", 1)
    other.set("k", 1)
    assert set(one.wants(other.digest())) == {other.owner}
    assert set(other.wants(one.digest())) == {one.owner, third.owner}
    assert {delta.owner for delta in one.deltas_for(other.digest(), EVERYTHING)} == {
        one.owner,
        third.owner,
    }
    for delta in one.deltas_for(other.digest(), EVERYTHING):
        other.apply(delta, 0.0)
    for delta in other.deltas_for(one.digest(), EVERYTHING):
        one.apply(delta, 0.0)
    assert one.digest() == other.digest()
    assert one.wants(other.digest()) == other.wants(one.digest()) == ()
    assert one.deltas_for(other.digest(), EVERYTHING) == ()


def test_wants_tells_of_an_earlier_life_of_ours() -> None:
    old, peer, new = store(0, 9), store(1), store(0, 3)
    old.set("a", 1)
    peer.apply(whole(old, old.owner), 0.0)
    assert new.wants(peer.digest()) == (new.owner,)
    new.set("a", 1)
    assert new.wants(peer.digest()) == (new.owner,)
    (delta,) = peer.deltas_for(new.digest(), EVERYTHING)
    assert new.apply(delta, 0.0) == OwnEpochSeen(Epoch(9))


def test_unknown_owners_come_first_then_the_most_stale() -> None:
    hub, peer = store(0), store(1)
    owners = [store(number) for number in range(2, 6)]
    for one, writes in zip(owners, (9, 2, 5, 7), strict=True):
        one.set("k", 0)
        if one is not owners[3]:
            peer.apply(whole(one, one.owner), 0.0)
        for number in range(writes):
            one.set("k", number + 1)
        hub.apply(whole(one, one.owner), 0.0)
    told = [delta.owner for delta in hub.deltas_for(peer.digest(), EVERYTHING)]
    assert told == [owners[3].owner, owners[0].owner, owners[2].owner, owners[1].owner]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from("abcdef"), st.integers(0, 300)), max_size=25
    ),
    st.integers(0, 4000),
)
def test_deltas_keep_to_the_encoded_size_and_are_cut_at_a_version(
    writes: list[tuple[int, str, int]], bytes_max: int
) -> None:
    owners = [store(number) for number in range(3)]
    hub = owners[0]
    for number, key, size in writes:
        owners[number].set(key, "x" * size)
    for one in owners[1:]:
        for delta in one.deltas_for((), EVERYTHING):
            hub.apply(delta, 0.0)
    deltas = hub.deltas_for((), bytes_max)
    assert sum(len(pack(pack_delta(delta))) for delta in deltas) <= bytes_max
    if bytes_max >= RUMOUR_BYTES_MAX and hub.owners():
        assert deltas
    for delta in deltas:
        entries = whole(hub, delta.owner).entries
        assert delta.entries == entries[: len(delta.entries)]
        if len(delta.entries) < len(entries):
            assert delta.until == delta.entries[-1].version
        else:
            assert delta.until == delta.head.max_version
        assert isinstance(store(7).apply(over_the_wire(delta), 0.0), Applied)


def test_a_span_in_which_all_was_deleted_still_moves_the_peer() -> None:
    owner, peer = store(0), store(1)
    owner.set("stays", 1)
    owner.set("k", 1)
    peer.apply(whole(owner, owner.owner), 0.0)
    owner.delete("k")
    owner.collect_tombstones(0)
    fresh = store(2)
    (delta,) = owner.deltas_for(fresh.digest(), EVERYTHING)
    assert (delta.until, len(delta.entries)) == (4, 1)
    fresh.apply(delta, 0.0)
    assert fresh.line(owner.owner) == owner.line(owner.owner)


def test_owners_are_bounded_and_our_own_place_is_kept() -> None:
    one = store(0, config=StoreConfig(owners_max=2))
    first, second = store(1), store(2)
    first.set("k", 1)
    second.set("k", 1)
    assert isinstance(one.apply(whole(first, first.owner), 0.0), Applied)
    full = Rejected(second.owner, RejectReason.TOO_MANY_OWNERS)
    assert one.apply(whole(second, second.owner), 0.0) == full
    assert one.wants(second.digest()) == ()
    assert one.set("k", 1) is not None
    one.forget(first.owner)
    assert isinstance(one.apply(whole(second, second.owner), 0.0), Applied)


def test_a_forgotten_owner_comes_back_in_the_same_life_or_a_later_one_but_no_earlier() -> None:
    peer = store(1)
    lives = [store(0, epoch) for epoch in (4, 5, 6)]
    for life in lives:
        life.set("k", 1)
    peer.apply(whole(lives[1], lives[1].owner), 0.0)
    peer.forget(lives[1].owner)
    assert peer.owners() == ()
    assert peer.age_s(lives[1].owner, 1.0) is None
    assert peer.wants(lives[0].digest()) == ()
    stale = Rejected(lives[0].owner, RejectReason.STALE_EPOCH)
    assert peer.apply(whole(lives[0], lives[0].owner), 0.0) == stale
    assert isinstance(peer.apply(whole(lives[1], lives[1].owner), 0.0), Applied)
    peer.forget(lives[1].owner)
    assert isinstance(peer.apply(whole(lives[2], lives[2].owner), 0.0), Applied)


def test_every_read_can_say_how_old_it_is() -> None:
    owner, peer = store(0), store(1)
    assert peer.age_s(owner.owner, 5.0) is None
    assert peer.updated_at_s(owner.owner) is None
    owner.set("k", 1)
    peer.apply(whole(owner, owner.owner), 10.0)
    assert peer.age_s(owner.owner, 14.0) == 4.0
    peer.confirm(owner.owner, 13.0)
    peer.confirm(owner.owner, 11.0)  # an older confirmation does not make it older
    assert peer.age_s(owner.owner, 14.0) == 1.0
    assert peer.updated_at_s(owner.owner) == 10.0
    assert peer.age_s(peer.owner, 99.0) == 0.0


def test_the_text_of_an_id() -> None:
    node = node_id_of(signer(0).public_key)
    text = node_id_text(node)
    assert len(text) == 26
    assert text.startswith(node_id_short(node))
    assert len(node_id_short(node)) == 8
    assert node_id_parse(text) == node_id_parse(text.upper()) == node


@pytest.mark.parametrize("text", ["", "a", "a" * 25, "1" * 26, "z" * 26, "é" * 26, "a" * 26 + "="])
def test_what_is_no_id(text: str) -> None:
    with pytest.raises(ValueError, match="is not a node id"):
        node_id_parse(text)


def test_the_digest_follows_every_change() -> None:
    one, other = store(0), store(1)
    assert one.digest() == ()
    one.set("a", 1)
    assert one.digest() == (one.line(one.owner),)
    one.apply(rumour(other.set("b", 2)), 0.0)
    assert one.digest() == tuple(one.line(owner) for owner in one.owners())
    assert one.pull_line(other.owner) == other.line(other.owner)
    one.learn_epoch(Epoch(7))
    assert one.digest() == tuple(one.line(owner) for owner in one.owners())
    one.forget(other.owner)
    assert one.digest() == (one.line(one.owner),)
    assert one.pull_line(other.owner) is None


def test_deltas_among_some_owners_are_of_no_others() -> None:
    hub = store(0)
    owners = [store(number) for number in range(1, 4)]
    for one in owners:
        hub.apply(rumour(one.set("key", 1)), 0.0)
    asked = [owners[1].owner, node_id_of(b"nobody".ljust(32))]
    assert [delta.owner for delta in hub.deltas_for((), 10**6, asked)] == [owners[1].owner]
    assert len(hub.deltas_for((), 10**6)) == 3
