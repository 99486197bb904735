"""Sealed datagrams: what is authentic opens once, everything else is dropped and changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.core.config import SEALING_BYTES
from meshd.core.sealing import (
    COUNTER_MAX,
    DATAGRAM_BYTES_MAX,
    DATAGRAM_PAYLOAD_BYTES_MAX,
    OLD_EPOCHS_PER_S,
    OVERHEAD_BYTES,
    TAG_BYTES,
    WINDOW_BITS,
    CounterExhausted,
    Dropped,
    DropReason,
    Opened,
    Opener,
    PayloadTooLarge,
    Sealer,
    mesh_tag,
)
from meshd_cms.types import Epoch, MeshId, NodeId

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
MESH = MeshId(b"m" * 16)
ALICE = NodeId(b"a" * 16)
BOB = NodeId(b"b" * 16)
EPOCH = Epoch(1_700_000_000_000)


def sealer(
    epoch: Epoch = EPOCH, *, key: bytes = KEY, me: NodeId = ALICE, counter: int = 0
) -> Sealer:
    return Sealer(key, MESH, me, epoch, counter=counter)


def opener(*keys: bytes, senders_max: int = 64) -> Opener:
    return Opener(keys or (KEY,), MESH, BOB, senders_max=senders_max)


def dropped(reason: DropReason) -> Dropped:
    return Dropped(reason)


@given(payload=st.binary(max_size=DATAGRAM_PAYLOAD_BYTES_MAX))
@settings(max_examples=60, deadline=None)
def test_what_is_sealed_opens_once(payload: bytes) -> None:
    datagram = sealer().seal(payload)
    assert len(datagram) == len(payload) + OVERHEAD_BYTES <= DATAGRAM_BYTES_MAX
    bob = opener()
    assert bob.open(datagram, 0.0) == Opened(ALICE, EPOCH, payload)
    assert bob.open(datagram, 0.0) == dropped(DropReason.REPLAYED)


def test_what_is_meant_for_one_node_opens_at_no_other() -> None:
    carol = NodeId(b"c" * 16)
    datagram = sealer().seal(b"hello", BOB)
    other = Opener((KEY,), MESH, carol)
    assert other.open(datagram, 0.0) == dropped(DropReason.BAD_SEAL)
    assert opener().open(datagram, 0.0) == Opened(ALICE, EPOCH, b"hello")
    relabelled = b"\x01" + datagram[1:]
    assert other.open(relabelled, 0.0) == dropped(DropReason.BAD_SEAL)


def test_the_wire_is_what_the_protocol_page_says() -> None:
    datagram = sealer().seal(b"hello")
    assert datagram[0] == 1
    assert datagram[1:5] == mesh_tag(MESH)[:4]
    assert datagram[5:21] == ALICE
    assert datagram[21:27] == EPOCH.to_bytes(6, "big")
    assert datagram[27:33] == (1).to_bytes(6, "big")
    assert len(datagram) == 33 + 5 + 16 == OVERHEAD_BYTES + 5
    assert OVERHEAD_BYTES == SEALING_BYTES
    # A golden value: a change of key schedule, nonce or associated data must not pass unseen.
    assert datagram[33:].hex() == "0f9145e8948aafcaa01b95ddc046ddddbc60468334"


def test_the_payload_is_not_readable_on_the_wire() -> None:
    assert b"arithmetic" not in sealer().seal(b"knowledge.gpt/arithmetic")


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"", DropReason.TOO_SHORT),
        (bytes(OVERHEAD_BYTES - 1), DropReason.TOO_SHORT),
        (bytes(DATAGRAM_BYTES_MAX + 1), DropReason.TOO_LONG),
        (bytes(OVERHEAD_BYTES), DropReason.WRONG_FORMAT),
        (sealer(me=BOB).seal(b"x"), DropReason.OWN),
        (Sealer(KEY, MeshId(b"n" * 16), ALICE, EPOCH).seal(b"x"), DropReason.OTHER_MESH),
        (sealer(key=OTHER_KEY).seal(b"x"), DropReason.BAD_SEAL),
    ],
)
def test_each_reason_is_told_and_counted(datagram: bytes, reason: DropReason) -> None:
    bob = opener()
    assert bob.open(datagram, 0.0) == dropped(reason)
    assert bob.statistics()[reason.value] == 1
    assert sum(bob.statistics().values()) == 1


def test_an_older_epoch_is_marked_and_a_newer_one_starts_afresh() -> None:
    bob = opener()
    first, second = sealer(Epoch(5)), sealer(Epoch(6))
    early, late = first.seal(b"early"), first.seal(b"late")
    assert bob.open(late, 0.0) == Opened(ALICE, Epoch(5), b"late")
    assert bob.open(second.seal(b"new life"), 0.0) == Opened(ALICE, Epoch(6), b"new life")
    assert bob.open(early, 0.0) == Opened(ALICE, Epoch(5), b"early", is_old_epoch=True)
    assert bob.open(early) == dropped(DropReason.OLD_EPOCH)  # who cannot answer does not ask for it


def test_a_few_of_older_epochs_are_opened_each_second_and_for_each_sender() -> None:
    bob, carol = opener(), NodeId(b"c" * 16)
    for name in (ALICE, carol):
        assert isinstance(bob.open(sealer(Epoch(9), me=name).seal(b"now"), 0.0), Opened)
    old = {name: sealer(Epoch(8), me=name).seal(b"then") for name in (ALICE, carol)}
    for _ in range(OLD_EPOCHS_PER_S):  # replays too: they may cause an answer and no more
        assert bob.open(old[ALICE], 0.0) == Opened(ALICE, Epoch(8), b"then", is_old_epoch=True)
    assert bob.open(old[ALICE], 0.0) == dropped(DropReason.OLD_EPOCH)
    assert isinstance(bob.open(old[carol], 0.0), Opened)
    assert isinstance(bob.open(old[ALICE], 1.0 / OLD_EPOCHS_PER_S), Opened)
    assert bob.open(old[ALICE], 1.0 / OLD_EPOCHS_PER_S) == dropped(DropReason.OLD_EPOCH)
    assert bob.statistics()["opened_old_epoch"] == OLD_EPOCHS_PER_S + 2
    assert bob.statistics()["old_epoch"] == 2


def test_an_older_epoch_leaves_the_window_and_the_newer_epoch_as_they_were() -> None:
    bob, new = opener(), sealer(Epoch(6), counter=40)
    first = new.seal(b"1")
    assert isinstance(bob.open(first, 0.0), Opened)
    assert isinstance(bob.open(sealer(Epoch(5), counter=99).seal(b"old"), 0.0), Opened)
    assert bob.open(first, 0.0) == dropped(DropReason.REPLAYED)
    assert bob.open(new.seal(b"2"), 0.0) == Opened(ALICE, Epoch(6), b"2")
    assert isinstance(bob.open(sealer(Epoch(6)).seal(b"0"), 0.0), Opened)  # within the window


def test_an_older_epoch_that_is_not_authentic_is_told_as_that() -> None:
    bob = opener()
    assert isinstance(bob.open(sealer(Epoch(6)).seal(b"x"), 0.0), Opened)
    forged = sealer(Epoch(5), key=OTHER_KEY).seal(b"x")
    assert bob.open(forged, 0.0) == dropped(DropReason.BAD_SEAL)


def test_an_older_epoch_does_not_save_its_sender_from_being_forgotten() -> None:
    bob = opener(senders_max=2)
    names = [NodeId(bytes([index]) * 16) for index in range(3)]
    for name in names[:2]:
        assert isinstance(bob.open(sealer(Epoch(6), me=name).seal(b"x"), 0.0), Opened)
    assert isinstance(bob.open(sealer(Epoch(5), me=names[0]).seal(b"x"), 0.0), Opened)
    assert isinstance(bob.open(sealer(me=names[2]).seal(b"x"), 0.0), Opened)
    again = bob.open(sealer(Epoch(5), me=names[0], counter=1).seal(b"x"), 0.0)
    assert again == Opened(names[0], Epoch(5), b"x")  # a stranger once more


def test_a_forged_newer_epoch_does_not_shut_the_sender_out() -> None:
    bob, alice = opener(), sealer()
    assert isinstance(bob.open(alice.seal(b"1"), 0.0), Opened)
    forged = bytearray(alice.seal(b"2"))
    forged[21:27] = (EPOCH + 1).to_bytes(6, "big")
    assert bob.open(bytes(forged), 0.0) == dropped(DropReason.BAD_SEAL)
    assert isinstance(bob.open(alice.seal(b"3"), 0.0), Opened)


def test_the_window_takes_reordered_datagrams_and_no_older_ones() -> None:
    alice, bob = sealer(), opener()
    datagrams = [alice.seal(b"%d" % index) for index in range(WINDOW_BITS + 1)]
    assert isinstance(bob.open(datagrams[-1], 0.0), Opened)
    assert bob.open(datagrams[0], 0.0) == dropped(DropReason.REPLAYED)  # just behind the window
    assert isinstance(bob.open(datagrams[1], 0.0), Opened)  # its last place
    assert bob.open(datagrams[1], 0.0) == dropped(DropReason.REPLAYED)


def test_a_far_jump_ahead_forgets_what_is_behind_the_window() -> None:
    bob = opener()
    old = sealer().seal(b"old")
    assert isinstance(bob.open(sealer(counter=10**14).seal(b"far"), 0.0), Opened)
    assert bob.open(old, 0.0) == dropped(DropReason.REPLAYED)


@given(order=st.lists(st.integers(0, 1500), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_order_opens_each_at_most_once_and_all_within_the_window(order: list[int]) -> None:
    bob = opener()
    accepted: set[int] = set()
    for counter in order:
        datagram = sealer(counter=counter).seal(b"%d" % counter)
        highest = max(accepted, default=-1)
        expected = counter not in accepted and counter > highest - WINDOW_BITS
        assert isinstance(bob.open(datagram, 0.0), Opened) == expected
        if expected:
            accepted.add(counter)


def test_the_counter_never_wraps() -> None:
    alice = sealer(counter=COUNTER_MAX - 1)
    assert isinstance(opener().open(alice.seal(b"last"), 0.0), Opened)
    with pytest.raises(CounterExhausted):
        alice.seal(b"one too many")
    alice.rekey(Epoch(EPOCH + 1))
    assert opener().open(alice.seal(b"go on"), 0.0) == Opened(ALICE, Epoch(EPOCH + 1), b"go on")


def test_a_payload_that_does_not_fit_uses_no_counter() -> None:
    alice = sealer()
    with pytest.raises(PayloadTooLarge):
        alice.seal(bytes(DATAGRAM_PAYLOAD_BYTES_MAX + 1))
    assert alice.seal(b"") == sealer().seal(b"")


def test_both_keys_open_while_keys_rotate() -> None:
    bob = opener(OTHER_KEY, KEY)
    assert isinstance(bob.open(sealer().seal(b"old key"), 0.0), Opened)
    rotated = sealer(key=OTHER_KEY, counter=1)
    assert isinstance(bob.open(rotated.seal(b"new key"), 0.0), Opened)
    assert bob.open(sealer().seal(b"old key"), 0.0) == dropped(DropReason.REPLAYED)


def test_a_sender_goes_on_under_a_new_key_with_no_nonce_used_twice() -> None:
    alice, bob = sealer(), opener(KEY)
    first = [alice.seal(b"old %d" % number) for number in range(3)]
    assert all(isinstance(bob.open(one, 0.0), Opened) for one in first[:2])
    bob.use_keys((OTHER_KEY, KEY))
    alice.use_key(OTHER_KEY)
    second = alice.seal(b"new")
    assert bob.open(second, 0.0) == Opened(ALICE, EPOCH, b"new")
    assert bob.key_of(ALICE) == OTHER_KEY
    assert second[27:33] > first[-1][27:33]  # the counter went on
    assert bob.open(first[2], 0.0) == Opened(ALICE, EPOCH, b"old 2")  # late, under the old key
    for one in (*first, second, *first):
        assert bob.open(one, 0.0) == dropped(DropReason.REPLAYED)


def test_a_key_that_is_gone_opens_nothing() -> None:
    alice, bob = sealer(), opener(KEY)
    assert isinstance(bob.open(alice.seal(b"1"), 0.0), Opened)
    late = alice.seal(b"2")
    bob.use_keys((OTHER_KEY,))
    assert bob.open(late, 0.0) == dropped(DropReason.BAD_SEAL)
    alice.use_key(OTHER_KEY)
    assert bob.open(alice.seal(b"3"), 0.0) == Opened(ALICE, EPOCH, b"3")


@pytest.mark.parametrize(("epoch", "counter"), [(EPOCH, 2**40), (Epoch(2**47 - 1), 0)])
def test_a_member_that_spoilt_the_window_of_another_did_so_for_one_key(
    epoch: Epoch, counter: int
) -> None:
    alice, bob = sealer(), opener(KEY)
    liar = Sealer(KEY, MESH, ALICE, epoch, counter=counter)
    assert isinstance(bob.open(liar.seal(b"in the name of alice"), 0.0), Opened)
    assert isinstance(bob.open(alice.seal(b"true")), Dropped)
    bob.use_keys((OTHER_KEY, KEY))
    alice.use_key(OTHER_KEY)
    assert bob.open(alice.seal(b"heard"), 0.0) == Opened(ALICE, EPOCH, b"heard")
    bob.use_keys((OTHER_KEY,))
    assert bob.open(alice.seal(b"again"), 0.0) == Opened(ALICE, EPOCH, b"again")
    after = opener(OTHER_KEY)
    after.restore(bob.floors())
    assert after.open(alice.seal(b"after a restart"), 0.0) == Opened(
        ALICE, EPOCH, b"after a restart"
    )


def test_what_was_opened_before_a_restart_does_not_open_again() -> None:
    alice, before = sealer(), opener()
    old = [alice.seal(b"%d" % number) for number in range(5)]
    held_back = old.pop(1)  # it was lost on its way
    assert all(isinstance(before.open(one, 0.0), Opened) for one in old)
    after = opener()
    after.restore(before.floors())
    elsewhere = opener(OTHER_KEY)
    elsewhere.restore(before.floors())
    assert elsewhere.floors() == ()
    for one in (*old, held_back):
        assert after.open(one, 0.0) == dropped(DropReason.REPLAYED)
    assert after.open(alice.seal(b"new"), 0.0) == Opened(ALICE, EPOCH, b"new")
    assert after.open(sealer(Epoch(EPOCH - 1)).seal(b"ghost")) == dropped(DropReason.OLD_EPOCH)
    assert isinstance(after.open(sealer(Epoch(EPOCH + 1)).seal(b"next"), 0.0), Opened)


def test_the_least_recently_heard_sender_is_forgotten_first() -> None:
    bob = opener(senders_max=2)
    names = [NodeId(bytes([index]) * 16) for index in range(3)]
    datagrams = [sealer(me=name).seal(b"x") for name in names]
    assert isinstance(bob.open(datagrams[0], 0.0), Opened)
    assert isinstance(bob.open(datagrams[1], 0.0), Opened)
    assert isinstance(
        bob.open(sealer(me=names[0], counter=1).seal(b"y"), 0.0), Opened
    )  # heard again
    assert isinstance(bob.open(datagrams[2], 0.0), Opened)
    assert bob.open(datagrams[0], 0.0) == dropped(DropReason.REPLAYED)  # still remembered
    assert isinstance(bob.open(datagrams[1], 0.0), Opened)  # forgotten


@given(noise=st.binary(max_size=DATAGRAM_BYTES_MAX + 10))
@settings(max_examples=100, deadline=None)
def test_noise_never_opens_and_never_raises(noise: bytes) -> None:
    assert isinstance(opener().open(noise, 0.0), Dropped)
    tagged = b"\x01" + mesh_tag(MESH)[:TAG_BYTES] + noise
    assert isinstance(opener().open(tagged, 0.0), Dropped)


@given(
    position=st.integers(0, OVERHEAD_BYTES + 4), change=st.integers(1, 255), cut=st.integers(0, 80)
)
@settings(max_examples=100, deadline=None)
def test_what_is_not_authentic_changes_nothing(position: int, change: int, cut: int) -> None:
    """Mutated and truncated copies first: the true one must then still open, and the window be whole."""
    alice, bob = sealer(), opener()
    before, true = alice.seal(b"before"), alice.seal(b"fresh")
    assert isinstance(bob.open(before, 0.0), Opened)
    mutated = bytearray(true)
    mutated[position] ^= change
    assert isinstance(bob.open(bytes(mutated), 0.0), Dropped)
    if cut:
        assert isinstance(bob.open(true[:-cut], 0.0), Dropped)
    assert bob.open(true, 0.0) == Opened(ALICE, EPOCH, b"fresh")
    assert bob.open(before, 0.0) == dropped(DropReason.REPLAYED)
