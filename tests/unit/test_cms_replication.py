"""Several stores exchange cut, reordered, repeated and lost deltas; each owner's history is the judge."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.support_cms import (
    EVERYTHING,
    MESH,
    hash_verify,
    over_the_wire,
    rumour,
    signer,
    store,
    whole,
)

from meshd_cms.store import Store
from meshd_cms.types import (
    RUMOUR_BYTES_MAX,
    Applied,
    Delta,
    DigestLine,
    Epoch,
    Known,
    NodeId,
    OwnEpochSeen,
    Parked,
    Rejected,
    RejectReason,
    StoreConfig,
    Value,
    Version,
)

NODES = 3
KEYS = "abcd"
FEW_KEYS = "ab"  # so that random scripts write, delete and collect the same key often
FIRST_EPOCH = 1000

nodes = st.integers(0, NODES - 1)
sizes = st.sampled_from([240, 330, 500, RUMOUR_BYTES_MAX])
steps = st.one_of(
    st.tuples(st.just("set"), nodes, st.sampled_from(FEW_KEYS), st.integers(0, 9)),
    st.tuples(st.just("set"), nodes, st.sampled_from(KEYS), st.integers(0, 9)),
    st.tuples(st.just("delete"), nodes, st.sampled_from(FEW_KEYS)),
    st.tuples(st.just("delete for good"), nodes, st.sampled_from(FEW_KEYS)),
    st.tuples(st.just("collect"), nodes, st.integers(0, 1)),
    st.tuples(st.just("exchange"), nodes, nodes, sizes),
    st.tuples(st.just("exchange"), nodes, nodes, sizes),
    st.tuples(st.just("digest"), nodes),
    st.tuples(st.just("answer_old_digest"), nodes, st.integers(0, 1000), sizes),
    st.tuples(st.just("deliver"), nodes, st.integers(0, 1000)),
    st.tuples(st.just("deliver"), nodes, st.integers(0, 1000)),
    st.tuples(st.just("save"), nodes),
    st.tuples(st.just("restart"), nodes),
    st.tuples(st.just("restart_without_disk"), nodes),
)


CUT_BEFORE_A_KEY_WRITTEN_AGAIN: list[tuple[object, ...]] = [
    ("set", 0, "b", 0),
    ("set", 0, "a", 0),
    ("exchange", 0, 2, 240),
    ("set", 0, "a", 1),
    ("delete", 0, "b"),
    ("delete", 0, "a"),
    ("set", 0, "b", 1),
    ("exchange", 0, 2, 240),
]
"""The second exchange has room for one entry: the peer knows that "a" is gone, and "b" as it was first."""


@dataclass
class World:
    """The stores, what is in flight (and may arrive any number of times), and what was ever written."""

    stores: list[Store] = field(
        default_factory=lambda: [store(number, FIRST_EPOCH) for number in range(NODES)]
    )
    in_flight: list[Delta] = field(default_factory=list[Delta])
    digests: list[tuple[DigestLine, ...]] = field(default_factory=list[tuple[DigestLine, ...]])
    history: dict[tuple[NodeId, Epoch], list[tuple[Version, str, Value]]] = field(
        default_factory=dict[tuple[NodeId, Epoch], list[tuple[Version, str, Value]]]
    )
    lines: dict[tuple[int, NodeId], DigestLine] = field(
        default_factory=dict[tuple[int, NodeId], DigestLine]
    )
    disks: dict[int, bytes] = field(default_factory=dict[int, bytes])
    restarts: int = 0

    def log(self, one: Store) -> list[tuple[Version, str, Value]]:
        return self.history.setdefault((one.owner, one.epoch), [])

    def write(self, number: int, key: str, value: Value) -> None:
        one = self.stores[number]
        delta = one.delete(key) if value is None else one.set(key, value)
        if delta:
            self.log(one).append((delta.until, key, value))
            self.in_flight.append(over_the_wire(delta))

    def deliver(self, number: int, delta: Delta) -> None:
        one = self.stores[number]
        before = {owner: one.items(owner) for owner in one.owners()}
        lines = one.digest()
        own = one.items(one.owner)
        result = one.apply(over_the_wire(delta), now_s=1.0)
        match result:
            case OwnEpochSeen(epoch=epoch):
                # Epochs are as good as unique in the field (unix-ms); here that takes care.
                while (one.owner, Epoch(epoch + 1)) in self.history:
                    epoch = Epoch(epoch + 1)
                assert one.learn_epoch(epoch)
                assert one.epoch > epoch
                self.disks[number] = (
                    one.snapshot()
                )  # as below: a life that speaks is a life on disk
                for entry in whole(one, one.owner).entries if one.line(one.owner) else ():
                    value = one.get(one.owner, entry.key)
                    self.log(one).append((entry.version, entry.key, value))
                self.lines.pop((number, one.owner), None)
            case Rejected() | Known() | Parked():
                assert before == {owner: one.items(owner) for owner in one.owners()}
                assert lines == one.digest()
                if isinstance(result, Rejected):
                    assert result.reason in {RejectReason.STALE_EPOCH, RejectReason.BEHIND_FLOOR}
            case Applied(owner=owner, changed_keys=keys):
                old, new = dict(before.get(owner, ())), dict(one.items(owner))
                differing = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
                assert differing == set(keys)
        assert one.items(one.owner) == own

    def exchange(self, sender: int, receiver: int, bytes_max: int) -> bool:
        deltas = self.stores[sender].deltas_for(self.stores[receiver].digest(), bytes_max)
        for delta in deltas:
            self.deliver(receiver, delta)
        return bool(deltas)

    def restart(self, number: int, disk: bytes | None) -> None:
        self.restarts += 1
        # A clock that is wrong after a restart: never the same, mostly before all that was.
        epoch = Epoch(FIRST_EPOCH - 10 * self.restarts)
        if disk is None:
            self.disks.pop(number, None)
            self.stores[number] = store(number, epoch)
        else:
            self.stores[number] = Store.restore(
                disk, StoreConfig(), MESH, signer(number), epoch, hash_verify, as_of_s=0.0
            )
            # The shell saves a new epoch before it speaks under it.
            self.disks[number] = self.stores[number].snapshot()
        self.lines = {at: line for at, line in self.lines.items() if at[0] != number}

    def step(self, step: tuple[object, ...]) -> None:
        match step:
            case ("set", int(number), str(key), int(value)):
                self.write(number, key, value)
            case ("delete", int(number), str(key)):
                self.write(number, key, None)
            case ("delete for good", int(number), str(key)):
                self.write(number, key, None)
                self.step(("collect", number, 0))
            case ("collect", int(number), int(keep)):
                if delta := self.stores[number].collect_tombstones(keep):
                    self.in_flight.append(over_the_wire(delta))
            case ("exchange", int(sender), int(receiver), int(size)):
                self.exchange(sender, receiver, size)
            case ("digest", int(number)):
                self.digests.append(self.stores[number].digest())
            case ("answer_old_digest", int(number), int(which), int(size)):
                if self.digests:
                    digest = self.digests[which % len(self.digests)]
                    self.in_flight.extend(self.stores[number].deltas_for(digest, size))
            case ("deliver", int(number), int(which)):
                if self.in_flight:
                    self.deliver(number, self.in_flight[which % len(self.in_flight)])
            case ("save", int(number)):
                self.disks[number] = self.stores[number].snapshot()
            case ("restart", int(number)):
                if number in self.disks:
                    self.restart(number, self.disks[number])
            case ("restart_without_disk", int(number)):
                self.restart(number, None)
            case _:
                raise AssertionError(step)

    def check(self) -> None:
        for number, one in enumerate(self.stores):
            for owner in one.owners():
                line = one.line(owner)
                assert line is not None
                before = self.lines.get((number, owner), line)
                assert (line.epoch, line.floor, line.max_version) >= (
                    before.epoch,
                    before.floor,
                    before.max_version,
                )
                self.lines[number, owner] = line
                self.check_prefix(one, line)

    def check_prefix(self, one: Store, line: DigestLine) -> None:
        log = self.history[line.owner, line.epoch]
        at_max = {key: value for version, key, value in log if version <= line.max_version}
        written_later = {key for version, key, _ in log if version > line.max_version}
        live = {key: value for key, value in at_max.items() if value is not None}
        held = dict(one.items(line.owner))
        # Nothing that was not so at this version: nothing made up, nothing resurrected. Only a key that the owner
        # has written again since may still be as it was: its entry at this version is gone, the next one is on its way.
        said = {(key, value) for version, key, value in log if version <= line.max_version}
        assert held.items() <= live.items() | {each for each in said if each[0] in written_later}
        # And everything that was, unless the owner has written it again since.
        assert live.keys() - held.keys() <= written_later

    def heal(self) -> None:
        for number in range(NODES):
            self.write(number, "node", f"alive {number} {len(self.in_flight)}")
        for _ in range(60):
            pairs = [(a, b) for a in range(NODES) for b in range(NODES) if a != b]
            moved = [self.exchange(a, b, 500) for a, b in pairs]
            self.check()
            if not any(moved):
                break
        first = self.stores[0]
        assert len(first.owners()) == NODES
        for other in self.stores[1:]:
            assert other.digest() == first.digest()
            for owner in first.owners():
                assert other.items(owner) == first.items(owner)
        for one in self.stores:
            log = self.history[one.owner, one.epoch]
            last = {key: value for _, key, value in log}
            live = {key: value for key, value in last.items() if value is not None}
            assert dict(first.items(one.owner)) == live


@settings(deadline=None, max_examples=100)
@given(st.lists(steps, min_size=20, max_size=80))
@example(CUT_BEFORE_A_KEY_WRITTEN_AGAIN)
def test_every_interleaving_keeps_the_invariants_and_converges(
    script: list[tuple[object, ...]],
) -> None:
    world = World()
    for step in script:
        world.step(step)
        world.check()
    world.heal()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 3) | st.none()), max_size=20))
def test_merging_again_changes_nothing(writes: list[tuple[str, int | None]]) -> None:
    owner, peer = store(0), store(1)
    deltas: list[Delta] = []
    for key, value in writes:
        delta = owner.delete(key) if value is None else owner.set(key, value)
        if delta:
            deltas.append(over_the_wire(delta))
            assert isinstance(peer.apply(delta, 0.0), Applied)
    state = (peer.digest(), peer.items(owner.owner), peer.snapshot())
    for delta in deltas:
        assert peer.apply(delta, 1.0) == Known(owner.owner)
    if deltas:
        assert peer.apply(whole(owner, owner.owner), 1.0) == Known(owner.owner)
    assert (peer.digest(), peer.items(owner.owner), peer.snapshot()) == state


def test_a_peer_behind_the_floor_starts_again_and_no_key_comes_back() -> None:
    owner, peer, third = store(0), store(1), store(2)
    owner.set("gone", 1)
    owner.set("stays", 1)
    for one in (peer, third):
        one.apply(whole(owner, owner.owner), 0.0)
    owner.delete("gone")
    raised = rumour(owner.collect_tombstones(0))
    assert peer.apply(raised, 0.0) == Parked(owner.owner, Version(0))
    (delta,) = owner.deltas_for(peer.digest(), EVERYTHING)
    assert delta.since == 0
    assert peer.apply(delta, 1.0) == Applied(owner.owner, ("gone",), reset=True)
    assert peer.items(owner.owner) == (("stays", 1),)
    # The third still has the key; it cannot bring it back.
    assert third.deltas_for(peer.digest(), EVERYTHING) == ()
    assert peer.apply(whole(third, owner.owner), 2.0) == Known(owner.owner)


def test_collecting_tombstones_keeps_the_newest_and_reaches_a_current_peer_as_a_rumour() -> None:
    owner, peer = store(0), store(1)
    for key in KEYS:
        owner.set(key, 1)
    for key in KEYS[:3]:
        owner.delete(key)
    peer.apply(whole(owner, owner.owner), 0.0)
    delta = rumour(owner.collect_tombstones(1))
    assert delta.entries == ()
    assert peer.apply(delta, 1.0) == Applied(owner.owner, (), reset=False)
    line = peer.line(owner.owner)
    assert (
        line == owner.line(owner.owner) == DigestLine(owner.owner, Epoch(1), Version(8), Version(6))
    )
    assert [entry.key for entry in whole(peer, owner.owner).entries] == ["d", "c"]
    assert owner.collect_tombstones(1) is None


def test_entries_below_a_floor_we_know_are_refused_from_a_sender_who_does_not() -> None:
    owner, early, late = store(0), store(1), store(2)
    owner.set("first", 1)
    for number in range(6):
        owner.set("doomed", number)
    early.apply(whole(owner, owner.owner), 0.0)  # knows "doomed" as live, and no floor
    owner.delete("doomed")
    owner.set("last", 1)
    owner.collect_tombstones(0)
    first_entry = owner.delta_since(owner.owner, Version(0), 300)
    assert first_entry is not None
    assert first_entry.until < first_entry.head.floor
    late.apply(first_entry, 0.0)
    below = early.delta_since(owner.owner, Version(1), EVERYTHING)
    assert below is not None
    assert late.apply(below, 0.0) == Rejected(owner.owner, RejectReason.BEHIND_FLOOR)
    assert early.deltas_for(late.digest(), EVERYTHING) == ()
    for delta in owner.deltas_for(late.digest(), EVERYTHING):
        late.apply(delta, 0.0)
    assert late.items(owner.owner) == owner.items(owner.owner)


def test_an_entry_left_out_of_a_cut_delta_is_noticed_and_mended_without_reads_going_back() -> None:
    owner, victim = store(0), store(1)
    for key in KEYS:
        owner.set(key, 1)
    full = whole(owner, owner.owner)
    # A dishonest relay: "b" is missing, and the cut hides it for now.
    lacking = Delta(
        owner.owner,
        full.epoch,
        Version(0),
        Version(3),
        (full.entries[0], full.entries[2]),
        full.head,
    )
    assert isinstance(victim.apply(lacking, 0.0), Applied)
    rest = owner.delta_since(owner.owner, Version(3), EVERYTHING)
    assert rest is not None
    bad = Rejected(owner.owner, RejectReason.BAD_LIVE_DIGEST)
    assert victim.apply(rest, 0.0) == bad
    line = victim.line(owner.owner)
    assert line is not None
    assert line.max_version == 3
    assert victim.deltas_for((), EVERYTHING) == ()  # what is in doubt is not passed on
    assert victim.delta_since(owner.owner, Version(0), EVERYTHING) is None
    assert victim.wants(owner.digest()) == (owner.owner,)
    for _ in range(10):
        assert victim.items(owner.owner) in ((("a", 1), ("c", 1)), owner.items(owner.owner))
        for delta in owner.deltas_for(victim.digest(), 300):
            victim.apply(over_the_wire(delta), 1.0)
    assert victim.items(owner.owner) == owner.items(owner.owner)
    assert victim.digest() == owner.digest()
    assert victim.updated_at_s(owner.owner) == 1.0


def test_entries_left_out_of_a_complete_delta_are_the_deltas_fault_alone() -> None:
    owner, victim = store(0), store(1)
    owner.set("a", 1)
    victim.apply(whole(owner, owner.owner), 0.0)
    owner.set("b", 1)
    owner.set("c", 1)
    good = owner.delta_since(owner.owner, Version(1), EVERYTHING)
    assert good is not None
    bad = Delta(owner.owner, good.epoch, good.since, good.until, good.entries[1:], good.head)
    before = victim.digest()
    assert victim.apply(bad, 0.0) == Rejected(owner.owner, RejectReason.BAD_LIVE_DIGEST)
    assert victim.digest() == before
    assert victim.apply(good, 0.0) == Applied(owner.owner, ("b", "c"), reset=False)


def test_what_an_older_head_brings_is_taken_without_mistaking_it_for_the_end() -> None:
    owner, early, late = store(0), store(1), store(2)
    for key in "abc":
        owner.set(key, 1)
    early.apply(whole(owner, owner.owner), 0.0)
    owner.set("a", 2)
    first = owner.delta_since(owner.owner, Version(0), 300)  # "b" alone: "a" is of version 4 by now
    assert first is not None
    assert [entry.key for entry in first.entries] == ["b"]
    late.apply(first, 0.0)
    (middle,) = early.deltas_for(late.digest(), EVERYTHING)
    assert middle.until == middle.head.max_version == 3
    assert late.apply(middle, 0.0) == Applied(owner.owner, ("c",), reset=False)
    (last,) = owner.deltas_for(late.digest(), EVERYTHING)
    assert late.apply(last, 0.0) == Applied(owner.owner, ("a",), reset=False)
    assert late.digest() == owner.digest()
