"""Nothing that its owner did not sign gets into a store, and a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_cms import (
    EVERYTHING,
    MESH,
    CountingVerifier,
    real_store,
    rumour,
    signer,
    store,
    whole,
)

from meshd_cms.entries import sign_entry, sign_head
from meshd_cms.types import (
    COUNTER_MAX,
    ENTRIES_MAX,
    ENTRY_BYTES_MAX,
    Applied,
    Delta,
    Entry,
    Epoch,
    Known,
    MeshId,
    NodeId,
    Parked,
    Rejected,
    RejectReason,
    Version,
)


def cut_off(delta: Delta, count: int) -> Delta:
    return replace(delta, entries=delta.entries[:count])


def first_entry(delta: Delta, entry: Entry) -> Delta:
    return replace(delta, entries=(entry, *delta.entries[1:]))


FORGERIES: list[tuple[RejectReason, Callable[[Delta], Delta]]] = [
    (
        RejectReason.BAD_HEAD_SIGNATURE,
        lambda d: replace(d, head=replace(d.head, signature=bytes(64))),
    ),
    (
        RejectReason.BAD_HEAD_SIGNATURE,
        lambda d: replace(d, head=replace(d.head, max_version=Version(d.head.max_version + 1))),
    ),
    (RejectReason.BAD_HEAD_SIGNATURE, lambda d: replace(d, head=replace(d.head, floor=Version(1)))),
    (
        RejectReason.BAD_HEAD_SIGNATURE,
        lambda d: replace(d, head=replace(d.head, live_digest=bytes(16))),
    ),
    (
        RejectReason.BAD_HEAD_SIGNATURE,
        lambda d: replace(d, epoch=Epoch(7), head=replace(d.head, epoch=Epoch(7))),
    ),
    (RejectReason.BAD_KEY, lambda d: replace(d, head=replace(d.head, public_key=bytes(32)))),
    (
        RejectReason.BAD_KEY,
        lambda d: replace(
            d, owner=NodeId(bytes(16)), head=replace(d.head, owner=NodeId(bytes(16)))
        ),
    ),
    (RejectReason.MALFORMED, lambda d: replace(d, owner=NodeId(bytes(16)))),
    (RejectReason.MALFORMED, lambda d: replace(d, epoch=Epoch(7))),
    (RejectReason.MALFORMED, lambda d: replace(d, until=Version(d.until + 1))),
    (RejectReason.MALFORMED, lambda d: replace(d, until=Version(1))),
    (RejectReason.MALFORMED, lambda d: replace(d, since=d.until)),
    (RejectReason.MALFORMED, lambda d: replace(d, since=Version(1))),
    (RejectReason.MALFORMED, lambda d: replace(d, since=Version(-1))),
    (RejectReason.MALFORMED, lambda d: replace(d, entries=d.entries[::-1])),
    (RejectReason.MALFORMED, lambda d: replace(d, entries=(d.entries[0], *d.entries))),
    (
        RejectReason.MALFORMED,
        lambda d: replace(d, entries=(d.entries[0], replace(d.entries[1], key=d.entries[0].key))),
    ),
    (RejectReason.MALFORMED, lambda d: first_entry(d, replace(d.entries[0], key=""))),
    (RejectReason.MALFORMED, lambda d: first_entry(d, replace(d.entries[0], key="\ud800"))),
    (RejectReason.MALFORMED, lambda d: first_entry(d, replace(d.entries[0], key="k" * 200))),
    (RejectReason.MALFORMED, lambda d: first_entry(d, replace(d.entries[0], value=b"\xc1"))),
    (
        RejectReason.MALFORMED,
        lambda d: first_entry(
            d, replace(d.entries[0], value=b"\xc5\x04\x00" + bytes(ENTRY_BYTES_MAX))
        ),
    ),
    (
        RejectReason.TOO_MANY_ENTRIES,
        lambda d: replace(d, entries=d.entries * ENTRIES_MAX),
    ),
    (
        RejectReason.BAD_ENTRY_SIGNATURE,
        lambda d: first_entry(d, replace(d.entries[0], key="other")),
    ),
    (
        RejectReason.BAD_ENTRY_SIGNATURE,
        lambda d: first_entry(d, replace(d.entries[0], value=b"\x07")),
    ),
    (RejectReason.BAD_ENTRY_SIGNATURE, lambda d: first_entry(d, replace(d.entries[0], value=None))),
    (
        RejectReason.BAD_ENTRY_SIGNATURE,
        lambda d: first_entry(d, replace(d.entries[0], signature=bytes(64))),
    ),
    (
        RejectReason.BAD_ENTRY_SIGNATURE,
        lambda d: first_entry(d, replace(d.entries[0], signature=d.entries[1].signature)),
    ),
    (RejectReason.BAD_LIVE_DIGEST, lambda d: cut_off(d, 1)),
    (RejectReason.BAD_LIVE_DIGEST, lambda d: cut_off(d, 0)),
]


@pytest.mark.parametrize("real", [False, True], ids=["hash", "ed25519"])
@pytest.mark.parametrize(("reason", "forge"), FORGERIES)
def test_a_forged_delta_is_refused_with_its_reason(
    reason: RejectReason, forge: Callable[[Delta], Delta], real: bool
) -> None:
    if real:
        owner, peer = real_store(1), real_store(2)
    else:
        owner, peer = store(0), store(1)
    for key in "ab":
        owner.set(key, key)
    good = whole(owner, owner.owner)
    forged = forge(good)
    assert forged != good
    assert peer.apply(forged, 0.0) == Rejected(forged.owner, reason)
    assert peer.digest() == ()
    assert isinstance(peer.apply(good, 0.0), Applied)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_change_of_any_field_is_refused_or_says_nothing_new(data: st.DataObject) -> None:
    owner, other, peer = store(0), store(1), store(2)
    for key in "abc":
        owner.set(key, key)
        other.set(key, key)
    owner.delete("b")
    peer.apply(whole(owner, owner.owner), 0.0)
    owner.set("d", 1)
    owner.set("e", 1)
    good = owner.delta_since(owner.owner, Version(data.draw(st.integers(0, 5))), EVERYTHING)
    assert good is not None
    versions = st.integers(-1, 9).map(Version) | st.just(Version(COUNTER_MAX + 1))
    entries = st.sampled_from([*good.entries, *whole(other, other.owner).entries])
    changed_entries = st.builds(
        replace,
        entries,
        key=st.sampled_from("abcdef"),
        version=versions,
        value=st.sampled_from([None, b"\x01", b"\xa1c"]),
    )
    head = st.builds(
        replace,
        st.just(good.head),
        max_version=versions | st.just(good.head.max_version),
        floor=versions | st.just(good.head.floor),
        signature=st.sampled_from([good.head.signature, bytes(64)]),
    )
    forged = replace(
        good,
        since=data.draw(versions | st.just(good.since)),
        until=data.draw(versions | st.just(good.until)),
        entries=tuple(
            data.draw(st.lists(entries | changed_entries, max_size=6) | st.just(good.entries))
        ),
        head=data.draw(head),
    )
    before = (peer.digest(), peer.items(owner.owner))
    result = peer.apply(forged, 0.0)
    if isinstance(result, Applied):
        # Only what the owner signed, all of it up to the version reached, moves the record.
        line = peer.line(owner.owner)
        assert line is not None
        log = {"a": 1, "c": 3, "b": 4, "d": 5, "e": 6}
        live = {key: owner.get(owner.owner, key) for key, v in log.items() if v <= line.max_version}
        if line.max_version == 6:
            assert dict(peer.items(owner.owner)) == {k: v for k, v in live.items() if v is not None}
        else:
            assert dict(peer.items(owner.owner)).items() <= live.items()
    else:
        assert isinstance(result, Known | Parked | Rejected)
        assert (peer.digest(), peer.items(owner.owner)) == before


def test_a_rolled_back_head_takes_nothing_away() -> None:
    owner, peer = store(0), store(1)
    owner.set("a", 1)
    old = whole(owner, owner.owner)
    owner.set("a", 2)
    peer.apply(whole(owner, owner.owner), 0.0)
    assert peer.apply(old, 0.0) == Known(owner.owner)
    newest = rumour(owner.set("a", 3))
    rolled_back = replace(newest, head=old.head)
    assert peer.apply(rolled_back, 0.0) == Rejected(owner.owner, RejectReason.MALFORMED)
    assert peer.get(owner.owner, "a") == 2


def test_an_owner_that_signs_two_heads_for_one_version_is_caught() -> None:
    owner, peer = store(0), store(1)
    for key in "abc":
        owner.set(key, 1)
    cut = owner.delta_since(owner.owner, Version(0), 300)
    assert cut is not None
    assert isinstance(peer.apply(cut, 0.0), Applied)
    good = owner.delta_since(owner.owner, cut.until, EVERYTHING)
    assert good is not None
    for head in (
        replace(good.head, live_digest=bytes(16)),
        replace(good.head, floor=Version(1)),
    ):
        lie = replace(good, head=sign_head(signer(0), MESH, head))
        expected = Rejected(owner.owner, RejectReason.CONFLICTING_HEAD)
        assert peer.apply(lie, 0.0) == expected
    assert isinstance(peer.apply(good, 0.0), Applied)


def test_a_floor_that_falls_is_caught() -> None:
    owner, peer = store(0), store(1)
    owner.set("a", 1)
    owner.set("b", 1)
    owner.delete("a")
    owner.collect_tombstones(0)
    peer.apply(whole(owner, owner.owner), 0.0)
    delta = rumour(owner.set("c", 1))
    lie = replace(delta, head=sign_head(signer(0), MESH, replace(delta.head, floor=Version(0))))
    assert peer.apply(lie, 0.0) == Rejected(owner.owner, RejectReason.CONFLICTING_HEAD)


def test_an_entry_signed_for_another_life_or_mesh_proves_nothing() -> None:
    owner, peer = store(0, 2), store(1)
    owner.set("a", 1)
    good = whole(owner, owner.owner)
    (entry,) = good.entries
    for mesh, epoch in ((MESH, 1), (MeshId(b"another mesh 16 "), 2)):
        foreign = sign_entry(signer(0), mesh, owner.owner, Epoch(epoch), entry)
        bad = Rejected(owner.owner, RejectReason.BAD_ENTRY_SIGNATURE)
        assert peer.apply(first_entry(good, foreign), 0.0) == bad
    elsewhere = store(0, 2, mesh=MeshId(b"another mesh 16 "))
    elsewhere.set("a", 1)
    bad = Rejected(owner.owner, RejectReason.BAD_HEAD_SIGNATURE)
    assert peer.apply(whole(elsewhere, owner.owner), 0.0) == bad


def test_a_flood_of_junk_costs_at_most_one_verification_each() -> None:
    verify = CountingVerifier()
    owner, peer = store(0), store(1, verify=verify)
    for number in range(50):
        owner.set(f"k{number}", number)
    good = whole(owner, owner.owner)
    for reason, forge in FORGERIES:
        before = verify.calls
        peer.apply(forge(good), 0.0)
        cheap = reason in {RejectReason.BAD_KEY, RejectReason.TOO_MANY_ENTRIES}
        late = {RejectReason.BAD_LIVE_DIGEST, RejectReason.BAD_ENTRY_SIGNATURE}
        if cheap:
            assert verify.calls == before
        elif reason not in late:
            assert verify.calls <= before + 1
        elif reason is RejectReason.BAD_ENTRY_SIGNATURE:
            assert verify.calls == before + 2


def test_real_signatures_through_three_nodes() -> None:
    owner, relay, last = (real_store(number) for number in (1, 2, 3))
    first = rumour(owner.set("node", {"name": "pi"}))
    second = rumour(owner.set("cap/x", {"slots": 2}))
    assert isinstance(relay.apply(first, 0.0), Applied)
    assert isinstance(relay.apply(second, 0.0), Applied)
    for delta in relay.deltas_for(last.digest(), EVERYTHING):
        assert isinstance(last.apply(delta, 0.0), Applied)
    assert last.items(owner.owner) == owner.items(owner.owner)
