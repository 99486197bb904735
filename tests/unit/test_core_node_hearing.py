"""What one node core believes of others, and whom it believes."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.support_core import (
    ME_ADDRESS,
    address,
    bench,
    claim,
    events_in,
    messages_in,
    node_id,
)

from meshd.core.config import lan
from meshd.core.events import (
    AddressContested,
    MemberAlive,
    MemberFailed,
    MemberJoined,
    MemberLeft,
    MemberSuspected,
    NameContested,
)
from meshd.core.membership import MemberState, Update
from meshd.core.messages import (
    Claim,
    Heartbeat,
    Nack,
    Ping,
    Pull,
    View,
)
from meshd_cms.types import Version

ALIVE, SUSPECT, DEAD, LEFT = MemberState
BEAT = Heartbeat(bytes(8), Version(0))


def test_the_life_of_a_member_as_events() -> None:
    node = bench()
    node.meet(61, 62)
    seen: list[type[object]] = []
    for state, incarnation, speakers in (
        (ALIVE, 0, (1,)),
        (SUSPECT, 0, (61, 62)),
        (ALIVE, 1, (1,)),
        (SUSPECT, 1, (61, 62)),
        (DEAD, 1, (61,)),
        (ALIVE, 2, (1,)),
        (LEFT, 2, (2,)),
    ):
        for speaker in speakers:
            one = claim(2, state, incarnation, accuser=speaker)
            seen += [
                type(event)
                for event in events_in(node.tell([Claim(one, merged=False)], peer=speaker))
                if getattr(event, "node", None) == node_id(2)
            ]
    assert seen == [
        MemberJoined,
        MemberSuspected,
        MemberAlive,
        MemberSuspected,
        MemberFailed,
        MemberJoined,
        MemberLeft,
    ]


def test_a_death_out_of_a_table_is_only_a_suspicion_and_confirms_none() -> None:
    node = bench()
    node.meet(1, 2, 3)
    node.tell([Claim(claim(3, DEAD, accuser=1), merged=True)], peer=1)
    assert node.state(3) is SUSPECT
    node.tell([Claim(claim(3, DEAD, accuser=2), merged=True)], peer=2)
    assert "claims_confirmed" not in node.core.statistics()


def test_a_death_from_one_mouth_is_a_suspicion_that_is_looked_into_and_from_two_is_believed() -> (
    None
):
    node = bench()
    node.meet(1, 2, 3)
    for _ in range(3):
        told = node.tell([Claim(claim(3, DEAD, accuser=1), merged=False)], peer=1)
    assert node.state(3) is SUSPECT
    assert not [m for m in messages_in(told) if isinstance(m, Claim) and m.update.state is DEAD]
    assert node.core.statistics()["probes"] == 1
    node.tell([Claim(claim(3, DEAD, accuser=2), merged=False)], peer=2)
    assert node.state(3) is DEAD


def test_a_leave_told_by_another_removes_nobody_and_by_itself_does() -> None:
    node = bench()
    node.meet(1, 2)
    for _ in range(3):
        node.tell([Claim(claim(2, LEFT), merged=False)], peer=1)
        node.tell([Claim(claim(2, LEFT), merged=True)], peer=1)
    assert node.state(2) is SUSPECT
    node.tell([Claim(claim(2, LEFT), merged=False)], peer=2)
    assert node.state(2) is LEFT


def test_an_accuser_who_is_refuted_again_and_again_is_not_listened_to_and_named() -> None:
    node = bench(replace(lan(), accusations_max=5))
    node.meet(1, 2, 3)
    for incarnation in range(10):
        accused = claim(3, SUSPECT, incarnation, accuser=1)
        node.tell([Claim(accused, merged=False)], peer=1)
        node.tell([Claim(claim(3, ALIVE, incarnation + 1), merged=False)], peer=3)
    assert node.core.statistics()["accusations_ignored"] == 4
    assert node.core.offences()[node_id(1)] == {"accusations_refuted": 1}
    node.tell([Claim(claim(3, SUSPECT, 10, accuser=2), merged=False)], peer=2)
    assert node.state(3) is SUSPECT  # others are


def test_an_accusation_in_our_name_that_we_never_made_is_dropped_and_its_teller_named() -> None:
    node = bench()
    node.meet(1, 3)
    forged = replace(claim(3, SUSPECT), accuser=node.store.owner)
    node.tell([Claim(forged, merged=False)], peer=1)
    assert node.state(3) is ALIVE
    assert node.core.offences()[node_id(1)] == {"claims_forged": 1}


def test_who_writes_anothers_name_under_its_lies_pays_itself() -> None:
    node = bench(replace(lan(), accusations_max=5))
    node.meet(1, 2, 3)
    for incarnation in range(20):
        accused = claim(3, SUSPECT, incarnation, accuser=2)
        node.tell([Claim(accused, merged=False)], peer=1)
        node.tell([Claim(claim(3, ALIVE, incarnation + 1), merged=False)], peer=3)
    assert list(node.core.offences()) == [node_id(1)]
    node.tell([Claim(claim(3, SUSPECT, 20, accuser=2), merged=False)], peer=2)
    assert node.state(3) is SUSPECT


def test_where_a_member_lives_is_asked_of_itself_at_both_addresses() -> None:
    node = bench()
    node.meet(1, 2)
    moved = replace(claim(2, ALIVE, 1), address=address(9))
    for _ in range(5):
        told = node.tell([Claim(moved, merged=False)], peer=1)
    assert node.core.statistics()["moves_asked"] == 1
    view = node.core.member(node_id(2))
    assert view is not None
    assert view.address == address(2)
    node.tell([Claim(moved, merged=False)], peer=2)
    view = node.core.member(node_id(2))
    assert view is not None
    assert view.address == address(9)
    assert told == ()


def test_a_mesh_that_loses_one_tells_little_more_than_two_witnesses_saw() -> None:
    node = bench()
    node.meet(*range(1, 31))
    for accuser in range(2, 31):
        told = replace(claim(1, SUSPECT, accuser=accuser), evidence=True)
        node.tell([Claim(told, merged=False)], peer=accuser)
    assert node.core.statistics()["rumours_started"] - 30 <= 2  # beside those of who joined


def test_what_no_clock_can_have_begun_is_believed_from_nobody_but_the_node_itself() -> None:
    node = bench()
    node.meet(1, 3)
    for epoch, incarnation in ((2**47 + 1, 0), (2**48 - 1, 0), (10, 2**31 + 1)):
        absurd = claim(3, ALIVE, incarnation, epoch=epoch)
        node.tell([Claim(absurd, merged=False)], peer=1)
    view = node.core.member(node_id(3))
    assert view is not None
    assert (view.epoch, view.incarnation) == (10, 0)
    assert node.core.offences()[node_id(1)] == {"epoch_absurd": 2}


def test_an_incarnation_of_ours_beyond_all_measure_ends_in_a_new_epoch_not_in_silence() -> None:
    node = bench()
    node.meet(1)
    node.now_s = 2.0
    me = node.store.owner
    told = Update(me, SUSPECT, node.store.epoch, 2**63 - 1, "me", ME_ADDRESS, node_id(1))
    before = node.store.epoch
    node.tell([Claim(told, merged=False)], peer=1)
    own = node.core.member(me)
    assert own is not None
    assert own.epoch > before
    assert own.incarnation == 0


def test_who_has_been_gone_longest_makes_room_for_who_comes() -> None:
    node = bench(replace(lan(), members_max=3))
    node.meet(1, 2, 3)
    node.tell([Claim(claim(1, LEFT), merged=False)], peer=1)
    node.meet(4)
    node.meet(4)
    assert node.state(1) is None
    assert node.state(4) is ALIVE


def test_a_dead_member_that_speaks_is_told_so() -> None:
    node = bench()
    node.meet(1)
    node.bury(1)
    told = messages_in(node.tell([Nack(1)], peer=1), address(1))
    assert [one.update.state for one in told if isinstance(one, Claim)] == [DEAD]


def test_an_earlier_life_is_told_of_the_later_and_not_listened_to() -> None:
    node = bench()
    node.tell([Claim(claim(1, epoch=50), merged=False)], epoch=50)
    told = messages_in(node.tell([Ping(1, node.store.owner, BEAT)], epoch=40), address(1))
    assert [type(one) for one in told] == [Claim]
    assert node.core.statistics()["dropped_old_epoch"] == 1


def test_a_stranger_is_asked_who_it_is() -> None:
    node = bench()
    told = messages_in(node.tell([Nack(1)], peer=9), address(9))
    assert told == [View(node_id(9), node_id(9), (), answer=False)]


def test_a_newcomers_record_is_pulled_from_itself() -> None:
    node = bench()
    node.meet(1)
    told = messages_in([effect for _, effect in node.run(0.1)], address(1))
    assert [[line.owner for line in one.lines] for one in told if isinstance(one, Pull)] == [
        [node_id(1)]
    ]


def test_two_with_one_name_are_both_kept_and_told_of() -> None:
    node = bench()
    other = replace(claim(1), name="me")
    events = events_in(node.tell([Claim(other, merged=False)]))
    assert NameContested("me", node_id(1), node.store.owner) in events
    assert node.state(1) is ALIVE


def test_a_contested_address_goes_to_the_later_life_and_the_other_is_suspected() -> None:
    node = bench()
    node.meet(1)
    newer = replace(claim(2, epoch=20), address=address(1))
    events = events_in(node.tell([Claim(newer, merged=False)], peer=2, epoch=20))
    assert AddressContested(address(1), node_id(2), node_id(1)) in events
    assert (node.state(1), node.state(2)) == (SUSPECT, ALIVE)


def test_two_that_both_show_themselves_at_one_address_are_not_accused_again_and_again() -> None:
    node = bench()
    node.meet(1)
    newer = replace(claim(2, epoch=20), address=address(1))
    seen = events_in(node.tell([Claim(newer, merged=False)], peer=2, epoch=20))
    for incarnation in range(1, 20):  # the loser refutes, and is believed
        refuted = replace(claim(1), incarnation=incarnation)
        seen += events_in(node.tell([Claim(refuted, merged=False)], peer=1))
    assert node.state(1) == ALIVE
    assert sum(isinstance(event, AddressContested) for event in seen) == 1
    assert sum(isinstance(event, MemberSuspected) for event in seen) == 1


def test_who_left_is_forgotten_with_its_record_and_is_no_ghost_later() -> None:
    node = bench()
    node.meet(1)
    node.tell([Claim(claim(1, LEFT), merged=False)])
    node.run(lan().left_keep_s + 2.0)
    assert node.state(1) is None
    node.tell([Claim(claim(1, ALIVE, 9), merged=True)], peer=2)
    assert node.state(1) is None
    node.tell([Claim(claim(1, epoch=11), merged=True)], peer=2)
    assert node.state(1) is ALIVE
