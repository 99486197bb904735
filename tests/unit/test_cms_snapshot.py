"""Saved states: what comes back, and that any damage is one typed error."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_cms import (
    EVERYTHING,
    MESH,
    CountingVerifier,
    hash_verify,
    signer,
    store,
    whole,
)

from meshd_cms.errors import SnapshotError, SnapshotReason
from meshd_cms.packing import pack
from meshd_cms.snapshot import (
    FORMAT,
    MAGIC,
    SNAPSHOT_BYTES_MAX,
    Saved,
    pack_snapshot,
    unpack_snapshot,
)
from meshd_cms.store import Store
from meshd_cms.types import EPOCH_MAX, Delta, Epoch, MeshId, StoreConfig, Version


def filled(epoch: int = 5) -> Store:
    one = store(0, epoch)
    one.set("mine", 1)
    for number in (1, 2):
        owner = store(number, 7)
        for key in "abc":
            owner.set(key, f"{number}{key}")
        owner.delete("b")
        one.apply(whole(owner, owner.owner), 0.0)
    return one


def restore(
    data: bytes, epoch: int = 1, mesh: MeshId = MESH, config: StoreConfig | None = None
) -> Store:
    return Store.restore(
        data, config or StoreConfig(), mesh, signer(0), Epoch(epoch), hash_verify, as_of_s=3.0
    )


def test_others_come_back_with_their_proofs_and_we_begin_a_new_life() -> None:
    saved = filled(epoch=5)
    again = restore(saved.snapshot(), epoch=2)
    assert again.epoch == 6
    assert again.get(again.owner, "mine") is None
    others = [line for line in saved.digest() if line.owner != saved.owner]
    assert list(again.digest()) == others
    for line in others:
        assert again.items(line.owner) == saved.items(line.owner)
        assert whole(again, line.owner) == whole(saved, line.owner)  # fit to be passed on
        assert again.age_s(line.owner, 10.0) == 7.0
    assert restore(saved.snapshot(), epoch=50).epoch == 50
    assert restore(again.snapshot()).epoch == 7


def test_the_same_state_gives_the_same_bytes() -> None:
    assert filled().snapshot() == filled().snapshot()
    assert restore(filled().snapshot()).snapshot() == restore(filled().snapshot()).snapshot()


def test_a_cut_record_comes_back_too() -> None:
    owner, one = store(1), store(0)
    for key in "abc":
        owner.set(key, 1)
    cut = owner.delta_since(owner.owner, Version(0), 300)
    assert cut is not None
    one.apply(cut, 0.0)
    again = restore(one.snapshot())
    assert again.digest() == one.digest()
    (rest,) = owner.deltas_for(again.digest(), EVERYTHING)
    again.apply(rest, 0.0)
    assert again.items(owner.owner) == owner.items(owner.owner)


def test_a_cut_at_every_byte_is_an_error() -> None:
    data = filled().snapshot()
    for length in range(len(data)):
        with pytest.raises(SnapshotError):
            restore(data[:length])
    with pytest.raises(SnapshotError):
        restore(data + b"\0")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_flip_of_any_bit_is_an_error(data: st.DataObject) -> None:
    good = filled().snapshot()
    at = data.draw(st.integers(0, len(good) - 1))
    damaged = bytearray(good)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SnapshotError):
        restore(bytes(damaged))


def with_checksum(payload: bytes) -> bytes:
    covered = FORMAT.to_bytes(2, "big") + len(payload).to_bytes(8, "big")
    return MAGIC + covered + hashlib.blake2b(covered + payload, digest_size=16).digest() + payload


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_an_error(data: bytes) -> None:
    for candidate in (data, MAGIC + data, with_checksum(data)):
        with pytest.raises(SnapshotError):
            restore(candidate)


def reason_of(data: bytes, **how: object) -> SnapshotReason:
    with pytest.raises(SnapshotError) as caught:
        restore(data, **how)  # type: ignore[arg-type]
    return caught.value.reason


def test_each_kind_of_damage_has_its_reason() -> None:
    data = filled().snapshot()
    assert reason_of(b"") is SnapshotReason.TRUNCATED
    assert reason_of(data[:20]) is SnapshotReason.TRUNCATED
    assert reason_of(data[:-1]) is SnapshotReason.TRUNCATED
    assert reason_of(b"GGUF" + data) is SnapshotReason.NOT_A_SNAPSHOT
    assert reason_of(MAGIC + b"\0\2" + data[10:]) is SnapshotReason.UNKNOWN_FORMAT
    assert reason_of(data[:-1] + bytes([data[-1] ^ 1])) is SnapshotReason.CHECKSUM
    assert reason_of(with_checksum(pack([1, 2, 3]))) is SnapshotReason.MALFORMED
    assert reason_of(data, mesh=MeshId(bytes(16))) is SnapshotReason.OTHER_MESH
    assert reason_of(data, config=StoreConfig(owners_max=2)) is SnapshotReason.TOO_LARGE
    assert reason_of(data + bytes(SNAPSHOT_BYTES_MAX)) is SnapshotReason.TOO_LARGE
    assert reason_of(store(1).snapshot()) is SnapshotReason.OTHER_NODE
    last = store(0, EPOCH_MAX).snapshot()
    assert reason_of(last) is SnapshotReason.MALFORMED


def tampered(change: str) -> bytes:
    saved = unpack_snapshot(filled().snapshot())
    record, other = saved.records
    tombstone = next(entry for entry in record.entries if entry.value is None)
    at = record.entries.index(tombstone)
    forged: Delta
    match change:
        case "head":
            forged = replace(record, head=replace(record.head, signature=bytes(64)))
        case "value":
            entry = replace(record.entries[0], value=b"\x07")
            forged = replace(record, entries=(entry, *record.entries[1:]))
        case "left out":
            forged = replace(record, entries=record.entries[1:])
        case "tombstone":
            entry = replace(tombstone, key="c2")
            forged = replace(record, entries=(*record.entries[:at], entry))
        case "cut":
            forged = replace(record, until=Version(1), entries=record.entries[:1])
            forged = replace(forged, entries=(replace(forged.entries[0], value=b"\x07"),))
        case _:
            raise AssertionError(change)
    return pack_snapshot(replace(saved, records=(forged, other)))


@pytest.mark.parametrize("change", ["head", "value", "left out", "tombstone", "cut"])
def test_tampering_with_a_valid_checksum_is_found_by_the_proofs(change: str) -> None:
    assert reason_of(tampered(change)) is SnapshotReason.BAD_PROOF


def test_records_that_no_store_saves_are_malformed() -> None:
    saved = unpack_snapshot(filled().snapshot())
    record = saved.records[0]
    ours = whole(filled(), filled().owner)
    for records in (
        (record, record),
        (ours,),
        (replace(record, since=Version(1)),),
        (replace(record, entries=record.entries[::-1]),),
    ):
        bad = pack_snapshot(replace(saved, records=records))
        assert reason_of(bad) is SnapshotReason.MALFORMED


def test_a_start_costs_one_verification_an_owner_and_one_a_tombstone() -> None:
    verify = CountingVerifier()
    Store.restore(
        filled().snapshot(), StoreConfig(), MESH, signer(0), Epoch(1), verify, as_of_s=0.0
    )
    assert verify.calls == 4


def test_an_empty_store_can_be_saved() -> None:
    one = store(0, 8)
    assert unpack_snapshot(one.snapshot()) == Saved(MESH, one.owner, Epoch(8), ())
    assert restore(one.snapshot()).epoch == 9
