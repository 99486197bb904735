"""Decrees: the same ones, in whatever order, lead to the same conclusions; and what a node does about them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_cms import over_the_wire, signer, store
from tests.unit.support_core import (
    ME_ADDRESS,
    Bench,
    address,
    claim,
    events_in,
    messages_in,
    node_id,
)
from tests.unit.support_decrees import decrees, generation, hash_verify_decree, revocation

from meshd.core.config import lan
from meshd.core.decrees import DECREES_MAX, Decree, DecreeKind, Decrees
from meshd.core.effects import Lane, Unwatch
from meshd.core.events import Decreed, DecreesPassedOver, MemberJoined, MemberRevoked, RecordChanged
from meshd.core.membership import LocalNode, MemberState
from meshd.core.messages import Claim, DecreesHeld, Proclaim, Record, Summary
from meshd.core.node import NodeCore
from meshd_cms.types import NodeId, node_id_of

FOUNDER, ISSUER, OTHER, DEEPER = (signer(number) for number in (70, 71, 72, 73))


def id_of(one: object) -> NodeId:
    return node_id_of(one.public_key)  # type: ignore[attr-defined, no-any-return]


POOL = [
    revocation(FOUNDER, id_of(ISSUER)),
    revocation(ISSUER, id_of(OTHER), rank=2),
    revocation(OTHER, id_of(ISSUER), rank=2),
    revocation(ISSUER, id_of(DEEPER), rank=2),
    revocation(DEEPER, node_id(1), rank=3),
    revocation(OTHER, node_id(2), rank=2),
    revocation(OTHER, node_id(2), rank=2, reason="again"),
    generation(FOUNDER, 1),
    generation(FOUNDER, 4),
    generation(ISSUER, 9, rank=2),
    generation(OTHER, 4, rank=2),
    generation(DEEPER, 5, rank=3),
]


def conclusions(held: Decrees) -> object:
    return held.ids(), held.revoked(), held.generation, held.hash


@given(
    chosen=st.lists(st.sampled_from(POOL), unique=True),
    seeds=st.tuples(st.integers(), st.integers()),
)
@settings(max_examples=200, deadline=None)
def test_the_order_in_which_decrees_come_decides_nothing(
    chosen: list[bytes], seeds: tuple[int, int]
) -> None:
    ended = []
    for seed in seeds:
        order = list(chosen)
        random.Random(seed).shuffle(order)
        held = decrees(*order)
        held.load(chosen)  # what was void for a moment is offered again
        ended.append(conclusions(held))
    assert ended[0] == ended[1]


def test_a_revoked_authority_takes_its_decrees_with_it() -> None:
    held = decrees(revocation(ISSUER, node_id(1), rank=2), generation(ISSUER, 9, rank=2))
    assert held.is_revoked(node_id(1))
    held.load([revocation(FOUNDER, id_of(ISSUER))])
    assert held.revoked() == (id_of(ISSUER),)
    assert held.generation is None
    held.load([revocation(ISSUER, node_id(2), rank=2)])
    assert not held.is_revoked(node_id(2))


def test_a_lower_rank_cannot_revoke_who_outranks_it_out_of_its_decrees() -> None:
    held = decrees(revocation(FOUNDER, node_id(1)), revocation(ISSUER, id_of(FOUNDER), rank=2))
    assert held.is_revoked(node_id(1))


def test_authorities_of_one_rank_can_both_be_out() -> None:
    held = decrees(
        revocation(ISSUER, id_of(OTHER), rank=2), revocation(OTHER, id_of(ISSUER), rank=2)
    )
    assert set(held.revoked()) == {id_of(ISSUER), id_of(OTHER)}


def test_the_highest_generation_is_in_force() -> None:
    held = decrees(generation(FOUNDER, 2), generation(ISSUER, 3, rank=2), generation(FOUNDER, 1))
    assert held.generation is not None
    assert held.generation.generation == 3
    assert len(held) == 2


def test_what_is_not_signed_is_not_held() -> None:
    held = Decrees(hash_verify_decree)
    forged = revocation(FOUNDER, node_id(1))[:-1] + b"\x00"
    assert held.load([forged, b"", b"\xc1", bytes(5000)]) == 4
    assert conclusions(held) == conclusions(Decrees(hash_verify_decree))


def test_decrees_are_bounded_and_a_key_can_still_be_changed() -> None:
    held = Decrees(
        lambda raw: Decree(DecreeKind.REVOCATION, id_of(FOUNDER), 1, 0.0, raw, NodeId(raw))
    )
    for number in range(DECREES_MAX + 10):
        held.load([number.to_bytes(16, "big")])
    assert len(held) == DECREES_MAX
    assert held.add(Decree(DecreeKind.KEY_GENERATION, id_of(FOUNDER), 1, 0.0, b"k", generation=1))


# -- one node ------------------------------------------------------------------------------------------------


def deciding(*raws: bytes) -> Bench:
    own = store(0, epoch=100)
    me = LocalNode(own.owner, "me", ME_ADDRESS)
    core = NodeCore(lan(), me, own, random.Random(1), decrees(*raws))
    core.start(0.0)
    return Bench(core, own)


def test_a_revoked_member_is_gone_at_once_with_all_that_was_known_of_it() -> None:
    node = deciding()
    theirs = store(5)
    delta = theirs.set("node", "somebody")
    assert delta is not None
    node.meet(1)
    alive = Claim(claim(2), merged=False)
    node.tell([alive], peer=2)
    node.tell([Record(over_the_wire(delta), rumour=True)])
    assert node.store.line(theirs.owner) is not None
    effects = node.tell([Proclaim(revocation(FOUNDER, node_id(2)), rumour=True)])
    assert MemberRevoked(node_id(2), "peer-2", address(2)) in events_in(effects)
    assert Unwatch(node_id(2)) in effects
    assert node.state(2) is None
    effects = node.tell([Proclaim(revocation(FOUNDER, theirs.owner), rumour=True)])
    assert RecordChanged(theirs.owner, ("node",), reset=True) in events_in(effects)
    assert node.store.line(theirs.owner) is None
    node.tell([Record(over_the_wire(delta), rumour=True)])
    assert node.store.line(theirs.owner) is None
    assert node.core.statistics()["record_revoked"] == 1


def test_nobody_can_bring_a_revoked_member_back() -> None:
    node = deciding(revocation(FOUNDER, node_id(2)))
    node.meet(1)
    for told in (claim(2), claim(2, MemberState.SUSPECT, accuser=1), claim(2, epoch=99)):
        for merged in (False, True):
            assert not events_in(node.tell([Claim(told, merged=merged)]))
    assert not [
        event
        for event in events_in(node.tell([Claim(claim(2, epoch=50), merged=False)], peer=2))
        if isinstance(event, MemberJoined)
    ]
    assert node.state(2) is None


def test_what_a_revoked_node_says_counts_for_nothing_and_it_is_told_why_now_and_then() -> None:
    raw = revocation(FOUNDER, node_id(2))
    node = deciding(raw)
    node.meet(1)
    accusation = Claim(claim(1, MemberState.SUSPECT, accuser=2), merged=False)
    told = [messages_in(node.tell([accusation], peer=2), address(2)) for _ in range(5)]
    assert told[0] == [Proclaim(raw, rumour=False)]
    assert told[1:] == [[]] * 4
    assert node.state(1) is MemberState.ALIVE
    assert node.core.statistics()["dropped_revoked"] == 5


def test_an_accusation_in_the_name_of_a_revoked_node_counts_for_nothing() -> None:
    node = deciding(revocation(FOUNDER, node_id(2)))
    node.meet(1, 3)
    node.tell([Claim(claim(1, MemberState.SUSPECT, accuser=2), merged=False)], peer=3)
    assert node.state(1) is MemberState.ALIVE


def test_a_decree_is_told_once_and_passed_on() -> None:
    raw = revocation(FOUNDER, node_id(9))
    node = deciding()
    node.meet(1, 2, 3)
    first = node.tell([Proclaim(raw, rumour=True)])
    assert [event.decree.raw for event in events_in(first) if isinstance(event, Decreed)] == [raw]
    assert not events_in(node.tell([Proclaim(raw, rumour=True)], peer=2))
    sent = [one for _, effect in node.run(0.2) for one in messages_in([effect], address(3))]
    assert Proclaim(raw, rumour=True) in sent


def test_a_decree_of_our_own_is_spread() -> None:
    node = deciding()
    node.meet(1)
    raw = generation(FOUNDER, 1)
    assert len(events_in(node.core.decree(raw, node.now_s))) == 1
    assert Proclaim(raw, rumour=True) in [
        one for _, effect in node.run(0.2) for one in messages_in([effect], address(1))
    ]


def test_forged_decrees_cost_their_teller_and_few_are_looked_at() -> None:
    looked_at: list[bytes] = []

    def verify(raw: bytes) -> Decree | None:
        looked_at.append(raw)
        return hash_verify_decree(raw)

    own = store(0, epoch=100)
    core = NodeCore(
        lan(), LocalNode(own.owner, "me", ME_ADDRESS), own, random.Random(1), Decrees(verify)
    )
    core.start(0.0)
    node = Bench(core, own)
    node.meet(1, 2)
    for number in range(100):
        node.tell([Proclaim(b"forged %d" % number, rumour=True)])
    assert len(looked_at) == 5
    assert node.core.offences()[node_id(1)]["decree_rejected"] == 5
    assert events_in(node.tell([Proclaim(revocation(FOUNDER, node_id(9)), rumour=True)], peer=2))


def test_forged_decrees_of_made_up_senders_share_a_bound_and_peers_are_to_be_asked_by_stream() -> (
    None
):
    node = deciding()
    node.meet(*range(1, 101))
    passed_over = [
        event
        for number in range(1_000)
        for event in events_in(
            node.tell([Proclaim(b"forged %d" % number, rumour=True)], peer=1 + number % 100)
        )
    ]
    assert passed_over == [DecreesPassedOver()]
    assert node.core.statistics()["decrees_rejected"] <= 32
    raw = revocation(FOUNDER, node_id(9))
    assert not events_in(node.tell([Proclaim(raw, rumour=True)], peer=2))
    told = events_in(node.tell([Proclaim(raw, rumour=True)], peer=2, lane=Lane.STREAM))
    assert [event.decree.raw for event in told if isinstance(event, Decreed)] == [raw]


def test_what_was_missed_is_found_by_comparing() -> None:
    ours, theirs = revocation(FOUNDER, node_id(8)), revocation(FOUNDER, node_id(9))
    node, peer = deciding(ours), decrees(theirs)
    node.meet(1)
    asked = messages_in(node.tell([Summary((0,), peer.hash)]), address(1))
    held = [one for one in asked if isinstance(one, DecreesHeld)]
    assert [one.ids for one in held] == [node.core.decrees.ids()]
    answer = DecreesHeld(bytes(8), b"\xff" * 8, peer.ids(), answer=True)
    told = messages_in(node.tell([answer]), address(1))
    assert Proclaim(ours, rumour=False) in told
    back = [one for one in told if isinstance(one, DecreesHeld)]
    assert [(one.ids, one.answer) for one in back] == [(node.core.decrees.ids(), False)]
    node.tell([Proclaim(theirs, rumour=False)])
    assert node.core.decrees.revoked() == tuple(sorted((node_id(8), node_id(9))))


def test_lists_longer_than_a_datagram_are_cut_and_join_up() -> None:
    raws = [revocation(FOUNDER, node_id(number)) for number in range(1000, 1300)]
    node, empty = deciding(*raws), deciding()
    node.meet(1)
    empty.meet(1)
    asked = messages_in(node.tell([Summary((0,), bytes(8))]), address(1))
    held = [one for one in asked if isinstance(one, DecreesHeld)]
    assert len(held) == 3
    assert sum(len(one.ids) for one in held) == 300
    answers = [one for part in held for one in messages_in(empty.tell([part]), address(1))]
    assert {one.ids for one in answers if isinstance(one, DecreesHeld)} == {()}


def test_the_state_hash_covers_decrees() -> None:
    with_one, without = deciding(revocation(FOUNDER, node_id(9))), deciding()
    assert with_one.core.state_hash != without.core.state_hash


@pytest.mark.parametrize("epoch", [5, 10])
def test_a_revoked_node_of_an_older_life_is_not_told_of_its_later_one(epoch: int) -> None:
    node = deciding(revocation(FOUNDER, node_id(2)))
    assert node.core.old_epoch(node_id(2), epoch, address(2), 1.0) == ()
