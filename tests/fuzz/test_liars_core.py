"""A member that lies, against real cores in the simulator: nobody dies of it, it costs little, and it is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from tests.sim.invariants import Checker
from tests.sim.machine import SimNode
from tests.sim.network import Clock
from tests.sim.world import MESH, World
from tests.unit.support_cms import HashSigner

from meshd.core.config import GossipConfig, lan
from meshd.core.events import MemberFailed, MemberLeft, RecordChanged
from meshd.core.membership import MemberState, Update
from meshd.core.messages import Claim, Heartbeat, Join, Message, Ping, Record, View
from meshd.core.wire import encode, payload_of
from meshd_cms.entries import UNSIGNED, leaf_of, live_digest, sign_entry, sign_head
from meshd_cms.types import Delta, Entry, Epoch, Head, NodeId, Version, node_id_of

NODES = 8
LIAR = NODES - 1
FOR_S = 5.0
RATE = 20.0  # lies a second to each


class Lenient(Checker):
    """What a liar says breaks the invariants of honest meshes: only what is sent is looked at."""

    def check(self, node: SimNode) -> None:
        pass

    def record_changed(self, node: SimNode, event: RecordChanged) -> None:
        pass


class Known(dict[NodeId, SimNode]):
    """The nodes that there are; of one that was made up, nothing is known."""

    def __missing__(self, node: NodeId) -> SimNode:
        ghost = HashSigner(bytes(32))
        return SimNode(-1, "ghost", ("192.0.2.1", 1), node, ghost, Clock(0.0), disturbed=True)


def mesh(config: GossipConfig | None = None) -> World:
    world = World(11, config or lan(), "liars")
    world.checker, world.by_id = Lenient(world), Known()
    world.add(NODES)
    world.settle()
    world.run(2.0)
    return world


@dataclass
class Scene:
    """Honest nodes and one that also says what it likes."""

    world: World
    lies: int = 0
    lied_bytes: int = 0
    lies_until_s: float = 0.0

    @property
    def liar(self) -> NodeId:
        return self.world.id(LIAR)

    def about(
        self,
        number: int,
        state: MemberState,
        accuser: NodeId,
        *,
        epoch: int | None = None,
        incarnation: int | None = None,
        evidence: bool = False,
    ) -> Update:
        """What may be said of a node, by default in its present life and incarnation."""
        node = self.world.nodes[number]
        view = self.world.core(number).member(node.id)
        assert view is not None
        return Update(
            node.id,
            state,
            view.epoch if epoch is None else Epoch(epoch),
            view.incarnation if incarnation is None else incarnation,
            node.name,
            node.address,
            accuser,
            evidence,
        )

    def tell(self, target: int, messages: Sequence[Message]) -> None:
        payload = payload_of([encode(message) for message in messages])
        self.lies += 1
        self.lied_bytes += len(payload)
        self.world.deliver(LIAR, target, payload)

    def lie(self, make: Callable[[int], list[Message]], for_s: float = FOR_S) -> None:
        """Tell `make(target)` to every honest node at `RATE`, for some time."""
        self.lies_until_s = self.world.now_s + for_s

        def again() -> None:
            if self.world.now_s >= self.lies_until_s:
                return
            for target in range(LIAR):
                if messages := make(target):
                    self.tell(target, messages)
            self.world.at(self.world.now_s + 1.0 / RATE, again)

        again()
        self.world.run(for_s)
        self.lies_until_s = 0.0

    def offences(self) -> dict[str, int]:
        """What the honest nodes hold against the liar."""
        total: dict[str, int] = {}
        for number in range(LIAR):
            for kind, count in self.world.core(number).offences().get(self.liar, {}).items():
                total[kind] = total.get(kind, 0) + count
        return total

    def ends(self) -> list[object]:
        """Deaths and leaves of honest nodes that any honest node believed in."""
        honest = {self.world.id(number) for number in range(LIAR)}
        return [
            event
            for _, holder, event in self.world.events
            if isinstance(event, MemberFailed | MemberLeft)
            and holder in honest
            and event.node in honest
        ]

    def check_nobody_died(self) -> None:
        assert self.ends() == []
        self.world.run(5.0)
        for number in range(LIAR):
            states = self.world.states_of(number)[:LIAR]
            assert set(states) <= {MemberState.ALIVE}, (number, states)


@pytest.fixture
def scene() -> Scene:
    return Scene(mesh())


def others(target: int) -> list[int]:
    return [number for number in range(LIAR) if number != target]


def test_claiming_everybody_dead_again_and_again_kills_nobody(scene: Scene) -> None:
    def dead(target: int) -> list[Message]:
        return [
            Claim(scene.about(number, MemberState.DEAD, scene.liar, evidence=True), merged=False)
            for number in range(LIAR)
        ]

    before = scene.world.wire_bytes
    scene.lie(dead)
    answered = scene.world.wire_bytes - before
    scene.check_nobody_died()
    assert scene.offences().get("accusations_refuted", 0) > 0
    assert answered < 3 * scene.lied_bytes


@pytest.mark.parametrize("state", [MemberState.SUSPECT, MemberState.DEAD, MemberState.LEFT])
def test_merged_bad_news_kills_nobody_and_costs_credit_too(
    scene: Scene, state: MemberState
) -> None:
    def merged(target: int) -> list[Message]:
        return [
            Claim(scene.about(number, state, scene.liar), merged=True) for number in others(target)
        ]

    scene.lie(merged)
    scene.check_nobody_died()
    assert scene.offences().get("accusations_refuted", 0) > 0


def test_saying_goodbye_for_another_removes_nobody(scene: Scene) -> None:
    def left(target: int) -> list[Message]:
        return [
            Claim(scene.about(number, MemberState.LEFT, scene.world.id(number)), merged=False)
            for number in others(target)
        ]

    scene.lie(left)
    scene.check_nobody_died()


def test_accusing_in_anothers_name_is_a_forgery_that_the_other_sees(scene: Scene) -> None:
    def forged(target: int) -> list[Message]:
        victim, name = 1 if target != 1 else 2, scene.world.id(target)
        return [Claim(scene.about(victim, MemberState.SUSPECT, name, evidence=True), merged=False)]

    scene.lie(forged)
    scene.check_nobody_died()
    assert scene.offences().get("claims_forged", 0) > 0


def test_who_was_framed_as_an_accuser_still_finds_a_crash(scene: Scene) -> None:
    def framed(target: int) -> list[Message]:
        return [
            Claim(scene.about(victim, MemberState.SUSPECT, scene.world.id(name)), merged=False)
            for victim in (1, 2, 3)
            for name in others(victim)
            if name != target
        ]

    scene.lie(framed, for_s=10.0)
    scene.world.crash(2, host=True)
    scene.world.nodes[2].disturbed = True

    def gone() -> bool:
        ours = [state for state in scene.world.states_of(2)[:LIAR] if state is not None]
        return all(not state.is_live for state in ours)

    scene.world.run_until(gone, 40.0, "the crash is known to all")


@pytest.mark.parametrize("ahead", [1, 2**40, 2**47, 2**62, 2**63 - 1])
def test_telling_of_other_lives_of_others_locks_nobody_out(scene: Scene, ahead: int) -> None:
    lives = {
        number: scene.about(number, MemberState.ALIVE, scene.liar).epoch for number in range(LIAR)
    }

    def later(target: int) -> list[Message]:
        return [
            Claim(
                scene.about(
                    number,
                    MemberState.ALIVE,
                    scene.world.id(number),
                    epoch=min(2**63 - 1, lives[number] + ahead),
                ),
                merged=False,
            )
            for number in range(LIAR)
        ]

    scene.lie(later, for_s=5.0)
    scene.check_nobody_died()
    if ahead > 2**48:
        offences = scene.offences()
        assert offences.get("epoch_absurd", 0) + offences.get("malformed", 0) > 0
    named = {
        offender
        for number in range(LIAR)
        for offender, kinds in scene.world.core(number).offences().items()
        if "epoch_absurd" in kinds
    }
    assert named <= {scene.liar}


@pytest.mark.parametrize("incarnation", [5, 2**31, 2**31 + 1, 2**63 - 1])
def test_high_incarnations_of_others_mute_nobody(scene: Scene, incarnation: int) -> None:
    def high(target: int) -> list[Message]:
        return [
            Claim(
                scene.about(number, MemberState.SUSPECT, scene.liar, incarnation=incarnation),
                merged=False,
            )
            for number in range(LIAR)
        ]

    scene.lie(high, for_s=5.0)
    scene.check_nobody_died()


def test_an_old_life_of_another_played_again_changes_nothing(scene: Scene) -> None:
    world = scene.world
    old = [scene.about(number, MemberState.ALIVE, world.id(number)) for number in range(LIAR)]
    world.crash(1)
    world.boot(1)
    world.settle()

    def replayed(target: int) -> list[Message]:
        return [Claim(update, merged=False) for update in old]

    epochs = {number: world.core(number).member(world.id(1)) for number in range(LIAR)}
    world.events.clear()
    scene.lie(replayed, for_s=5.0)
    scene.check_nobody_died()
    for number, before in epochs.items():
        after = world.core(number).member(world.id(1))
        assert after is not None
        assert before is not None
        assert after.epoch == before.epoch


def test_huge_versions_in_heartbeats_cost_no_more_than_they_bring(scene: Scene) -> None:
    def huge(target: int) -> list[Message]:
        heartbeat = Heartbeat(bytes(8), Version(2**62))
        return [Ping(1, scene.world.id(target), heartbeat)]

    before = scene.world.wire_bytes
    scene.lie(huge)
    scene.check_nobody_died()
    assert scene.offences().get("version_unfounded", 0) > 0
    assert scene.world.wire_bytes - before < 12 * scene.lied_bytes


def test_a_flood_of_joins_is_named_and_hardly_answered(scene: Scene) -> None:
    flood = [Join(token) for token in range(1, 20)]
    before = scene.world.wire_bytes
    scene.lie(lambda target: list(flood), for_s=5.0)
    scene.check_nobody_died()
    assert scene.offences().get("joins_excess", 0) > 0
    assert scene.world.wire_bytes - before < 4 * scene.lied_bytes


def test_asking_for_everything_again_and_again_is_answered_within_a_budget(scene: Scene) -> None:
    low, high = NodeId(bytes(16)), NodeId(b"\xff" * 16)
    before = scene.world.wire_bytes
    scene.lie(lambda target: [View(low, high, (), answer=False)] * 30, for_s=5.0)
    scene.check_nobody_died()
    assert scene.world.wire_bytes - before < 12 * scene.lied_bytes


def test_records_that_their_owner_did_not_sign_are_refused_and_named(scene: Scene) -> None:
    liars = scene.world.nodes[LIAR].signer
    made_up = {number: _record_of(scene.world.nodes[number], liars) for number in range(LIAR)}
    items = {number: scene.world.store(0).items(scene.world.id(number)) for number in range(LIAR)}

    def forged(target: int) -> list[Message]:
        return [Record(made_up[number], rumour=True) for number in others(target)[:3]]

    scene.lie(forged, for_s=5.0)
    scene.check_nobody_died()
    assert scene.offences().get("record_rejected", 0) > 0
    for number in range(LIAR):
        assert scene.world.store(0).items(scene.world.id(number)) == items[number]


def _record_of(about: SimNode, signer: HashSigner) -> Delta:
    """A record in the name of a node, with its public key, signed by another."""
    life = about.life
    assert life is not None
    entry = Entry("node", b"\xa5owned", Version(2**40), UNSIGNED)
    entry = sign_entry(signer, MESH, about.id, life.epoch, entry)
    digest = live_digest({"node": leaf_of(entry)})
    key = about.signer.public_key
    head = Head(about.id, life.epoch, entry.version, Version(0), digest, key, UNSIGNED)
    return Delta(
        about.id, life.epoch, Version(0), entry.version, (entry,), sign_head(signer, MESH, head)
    )


def test_a_record_that_is_written_at_full_speed_does_not_hold_up_those_of_others(
    scene: Scene,
) -> None:
    world = scene.world
    until_s = world.now_s + 5.0

    def write() -> None:
        for key in range(5):
            world.write(LIAR, f"hot/{key}", f"{world.now_s}" + "x" * 300)
        if world.now_s < until_s:
            world.at(world.now_s + 0.02, write)

    write()
    world.run(2.0)
    before = world.wire_bytes
    world.write(1, "mine", "a word of an honest node")

    def told() -> bool:
        return all(world.store(number).get(world.id(1), "mine") for number in range(LIAR))

    world.run_until(told, 2.0, "an honest write is known to all")
    world.run(2.0)
    assert (world.wire_bytes - before) / 2.0 / NODES < 400_000
    world.run(3.0)
    world.settle()
    scene.check_nobody_died()


def test_made_up_members_find_an_end_and_true_ones_still_get_in() -> None:
    scene = Scene(mesh(replace(lan(), members_max=60, dead_keep_s=60.0)))
    signers = [HashSigner(number.to_bytes(32, "big")) for number in range(300)]
    made_up = iter([node_id_of(signer.public_key) for signer in signers])
    world = scene.world

    def sybils(target: int) -> list[Message]:
        if target != 0:
            return []
        some = [next(made_up, None) for _ in range(10)]
        return [
            Claim(
                Update(node, MemberState.ALIVE, Epoch(1), 0, "ghost", ("192.0.2.1", 7946), node),
                merged=False,
            )
            for node in some
            if node is not None
        ]

    scene.lie(sybils, for_s=4.0)
    for number in range(LIAR):
        assert len(world.core(number).members()) <= world.config.members_max + 1
    world.add()
    world.run_until(
        lambda: world.states_of(NODES)[0] is MemberState.ALIVE, 60.0, "a true newcomer is listed"
    )
    assert scene.ends() == []
