"""Who is a member, and which of two claims about a node wins.

Invariant: what is held about a node is the maximum, in one total order, of every claim ever accepted
about it. So members that saw the same claims, in whatever order and however often, hold the same state;
nothing has to arrive in order, or once.

The order of claims is lexicographic over

    (epoch, left, incarnation, state)        False < True, ALIVE < SUSPECT < DEAD

    held | claim    Alive(i)   Suspect(i)   Dead(i)    Left         higher epoch, anything
    Alive(j)         i > j      i >= j       i >= j     always       always
    Suspect(j)       i > j      i > j        i >= j     always       always
    Dead(j)          i > j      i > j (*)    i > j      always       always
    Left             never      never        never      never        always

within one epoch (one life of the process); an epoch comes before any incarnation, so a restarted process
needs to know nothing of its former life, and an older life never speaks for a newer one. This is SWIM's
precedence (Das, Gupta, Motivala 2002, section 4.2) with two additions:

* Left is final for its epoch: a graceful leave cannot be refuted by a delayed Alive.
* (*) Suspect(i > j) lifts Dead(j). SWIM lets only Alive(i > j) do that, but a suspicion of incarnation i
  exists only because the subject, alive, took i: it stands for Alive(i) followed by Suspect(i). Without
  this cell the result would depend on which of the two claims arrived first.

Only the subject takes a new incarnation or epoch; `node.py` does that when it hears of itself.

The graveyard holds the last word about nodes no longer listed. A claim that does not beat it is a ghost
(an old Alive still travelling, or relayed by one who was cut off) and is not accepted.
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from meshd.core.config import GossipConfig
from meshd.core.effects import Address
from meshd_cms.types import DigestLine, Epoch, NodeId


class MemberState(Enum):
    """What is believed of a node."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"

    @property
    def strength(self) -> int:
        """Order among claims of one incarnation; travels on the wire."""
        return _STRENGTH[self]

    @property
    def is_live(self) -> bool:
        """Alive or suspected: still part of the mesh."""
        return self in (MemberState.ALIVE, MemberState.SUSPECT)


STATES: Final = (MemberState.ALIVE, MemberState.SUSPECT, MemberState.DEAD, MemberState.LEFT)
"""By strength."""

_STRENGTH: Final = {state: strength for strength, state in enumerate(STATES)}


@dataclass(frozen=True, slots=True)
class LocalNode:
    """This node, as it is made known; the epoch is the store's."""

    node: NodeId
    name: str
    address: Address


@dataclass(frozen=True, slots=True)
class Update:
    """A claim about a node, as it travels."""

    node: NodeId
    state: MemberState
    epoch: Epoch
    incarnation: int
    name: str
    address: Address
    accuser: NodeId  # who found out: the subject for ALIVE and LEFT, else a member
    evidence: bool = False  # of a suspicion: the accuser saw that the process is gone

    @property
    def precedence(self) -> tuple[int, bool, int, int]:
        """The place in the total order of claims."""
        return self.order(self.epoch, self.state, self.incarnation)

    @staticmethod
    def order(epoch: int, state: MemberState, incarnation: int) -> tuple[int, bool, int, int]:
        """The order itself: see the module's text."""
        return (epoch, state is MemberState.LEFT, incarnation, state.strength)


@dataclass(frozen=True, slots=True)
class Accusation:
    """That somebody accuses a member, as it was told to us."""

    evidence: bool  # it saw that the process is gone
    teller: NodeId  # who told us; the accuser itself, or whoever passed it on


@dataclass(slots=True)
class Member:
    """What is held about one other node. Mutable, and owned by the table."""

    update: Update  # the strongest claim
    since_s: float  # when the state, not the incarnation, last changed
    heard_s: float | None = None  # when it last spoke to us itself
    round_trip_s: float | None = None  # smoothed, of datagrams
    knocked_s: float | None = None  # when we last looked whether anybody listens there
    asked_s: float | None = None  # when we last asked it where it is
    accusers: dict[NodeId, Accusation] = field(default_factory=dict[NodeId, Accusation])

    @property
    def node(self) -> NodeId:
        """Its id."""
        return self.update.node

    @property
    def state(self) -> MemberState:
        """What is believed of it."""
        return self.update.state

    @property
    def address(self) -> Address:
        """Where it is reached."""
        return self.update.address

    @property
    def is_live(self) -> bool:
        """Alive or suspected."""
        return self.update.state.is_live

    @property
    def witnesses(self) -> int:
        """How many accusers saw that the process is gone."""
        return sum(accusation.evidence for accusation in self.accusers.values())


@dataclass(frozen=True, slots=True)
class MemberView:
    """A member as the rest of the daemon sees it."""

    node: NodeId
    name: str
    address: Address
    state: MemberState
    epoch: Epoch
    incarnation: int
    since_s: float
    round_trip_s: float | None
    heard_s: float | None = None  # when it last spoke to us itself; None: never, or it is ourselves
    is_self: bool = False


class Verdict(Enum):
    """What became of a claim about another node."""

    ACCEPTED = "accepted"
    CONFIRMED = "confirmed"  # the suspicion that is held, by one more accuser or with evidence
    STALE = "stale"  # something as strong or stronger is held
    GHOST = "ghost"  # the graveyard knows better
    UNKNOWN = "unknown"  # bad news about a node never listed: noted in the graveyard only
    FULL = "full"  # no room for one more member


@dataclass(frozen=True, slots=True)
class Transition:
    """The result of a claim; `before` is None for a node not listed until now."""

    verdict: Verdict
    before: Update | None = None
    member: Member | None = None


class Members:
    """The table of all other nodes. Iterates in order of arrival, which is the same for the same input."""

    def __init__(self, config: GossipConfig, me: NodeId, rng: random.Random) -> None:
        self._config = config
        self._me = me
        self._rng = rng
        self._table: dict[NodeId, Member] = {}
        self._by_address: dict[Address, NodeId] = {}
        self._graveyard: OrderedDict[NodeId, tuple[Update, float]] = OrderedDict()
        self._live: list[Member] | None = None

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Member]:
        return iter(tuple(self._table.values()))

    def __contains__(self, node: object) -> bool:
        return node in self._table

    def get(self, node: NodeId) -> Member | None:
        """The member, in whatever state."""
        return self._table.get(node)

    def at_address(self, address: Address) -> Member | None:
        """The member that holds this address."""
        holder = self._by_address.get(address)
        return None if holder is None else self._table.get(holder)

    def live(self) -> list[Member]:
        """Alive and suspected members, ourselves not among them. Do not change the list."""
        if self._live is None:
            self._live = [member for member in self._table.values() if member.is_live]
        return self._live

    def live_count(self) -> int:
        """Size of the mesh as we see it, ourselves included."""
        return len(self.live()) + 1

    def dead(self) -> list[Member]:
        """Members declared dead and not yet forgotten."""
        return [member for member in self._table.values() if member.state is MemberState.DEAD]

    def sample(self, count: int, *exclude: NodeId) -> list[Member]:
        """Up to `count` distinct random members that are alive and not suspected."""
        choice = [
            member
            for member in self.live()
            if member.state is MemberState.ALIVE and member.node not in exclude
        ]
        return self._rng.sample(choice, min(count, len(choice)))

    def last_word(self, node: NodeId) -> Update | None:
        """The strongest claim known about a node, listed or buried."""
        member = self._table.get(node)
        if member is not None:
            return member.update
        buried = self._graveyard.get(node)
        return None if buried is None else buried[0]

    def accept(self, update: Update, now_s: float, teller: NodeId | None = None) -> Transition:
        """Judge a claim about another node, and hold it if it wins (the table in the module's text).

        `teller` is who told us; None when it is our own judgement.
        """
        assert update.node != self._me, "claims about ourselves are answered, not held"
        member = self._table.get(update.node)
        accusation = Accusation(update.evidence, teller or self._me)
        if member is None:
            return self._accept_new(update, now_s, accusation)
        before = member.update
        if update.precedence == before.precedence:
            return self._confirm(member, update, accusation)
        if update.precedence < before.precedence:
            return Transition(Verdict.STALE, before, member)
        if (update.epoch, update.incarnation) == (before.epoch, before.incarnation):
            # Not from the subject, or a repetition by it: name and address are what the subject said.
            update = Update(
                before.node,
                update.state,
                before.epoch,
                before.incarnation,
                before.name,
                before.address,
                update.accuser,
                update.evidence,
            )
        if update.epoch != before.epoch:
            member.round_trip_s = None
        member.update = update
        if (
            update.state is not MemberState.DEAD
        ):  # the dead may yet show that they were accused wrongly
            member.accusers.clear()
        if update.state in (MemberState.SUSPECT, MemberState.DEAD):
            member.accusers[update.accuser] = accusation
        if update.state is not before.state:
            member.since_s = now_s
            self._live = None
        if update.address != before.address:
            self._release(before)
        self._claim_address(update)
        return Transition(Verdict.ACCEPTED, before, member)

    def bury(self, node: NodeId, now_s: float) -> Update:
        """No longer list a node, and remember its last word against ghosts."""
        member = self._table.pop(node)
        self._live = None
        self._release(member.update)
        self._remember(member.update, now_s)
        return member.update

    def expire_graveyard(self, now_s: float) -> None:
        """Forget the last words that are older than the configured time."""
        while self._graveyard:
            node, (_, until_s) = next(iter(self._graveyard.items()))
            if until_s > now_s:
                return
            del self._graveyard[node]

    def _accept_new(self, update: Update, now_s: float, accusation: Accusation) -> Transition:
        buried = self._graveyard.get(update.node)
        if buried is not None and update.precedence <= buried[0].precedence:
            return Transition(Verdict.GHOST, buried[0])
        if not update.state.is_live:
            self._remember(update, now_s)
            return Transition(Verdict.UNKNOWN)
        if len(self._table) >= self._config.members_max:
            return Transition(Verdict.FULL)
        self._graveyard.pop(update.node, None)
        member = Member(update, now_s)
        if update.state is MemberState.SUSPECT:
            member.accusers[update.accuser] = accusation
        self._table[update.node] = member
        self._live = None
        self._claim_address(update)
        return Transition(Verdict.ACCEPTED, None, member)

    def _confirm(self, member: Member, update: Update, accusation: Accusation) -> Transition:
        accuser = update.accuser
        if update.state is not MemberState.SUSPECT:
            return Transition(Verdict.STALE, member.update, member)
        # An accuser that nobody knows confirms nothing: names are free to invent.
        is_known = accuser == self._me or accuser in self._table
        former = member.accusers.get(accuser)
        if is_known and (former is None or update.evidence > former.evidence):
            member.accusers[accuser] = accusation
            return Transition(Verdict.CONFIRMED, member.update, member)
        return Transition(Verdict.STALE, member.update, member)

    def _claim_address(self, update: Update) -> None:
        """Addresses go to the live; between two live nodes, to the later life (`Node` tells of it)."""
        if not update.state.is_live:
            self._release(update)
            return
        holder = self.at_address(update.address)
        if holder is None or not holder.is_live or holder.update.epoch <= update.epoch:
            self._by_address[update.address] = update.node

    def _release(self, update: Update) -> None:
        if self._by_address.get(update.address) == update.node:
            del self._by_address[update.address]

    def _remember(self, update: Update, now_s: float) -> None:
        self._graveyard[update.node] = (update, now_s + self._config.graveyard_keep_s)
        self._graveyard.move_to_end(update.node)
        while len(self._graveyard) > self._config.graveyard_max:
            self._graveyard.popitem(last=False)


STATE_HASH_BYTES = 8


class StateHash:
    """8 bytes: XOR over (node, epoch, incarnation, record epoch, record version) of the live members.

    Two nodes that see the same live members and hold the same records have the same hash. Whether a
    member is suspected is left out: suspicions come and go by themselves.
    """

    def __init__(self) -> None:
        self._tokens: dict[NodeId, tuple[tuple[int, int, int, int], int]] = {}

    def of(
        self,
        lives: Iterable[tuple[NodeId, Epoch, int]],
        line: Callable[[NodeId], DigestLine | None],
    ) -> bytes:
        """The hash; only what changed since the last call is hashed anew."""
        before, self._tokens = self._tokens, {}
        total = 0
        for node, epoch, incarnation in lives:
            held = line(node)
            ours = (0, 0) if held is None else (held.epoch, held.max_version)
            particulars = (int(epoch), incarnation, int(ours[0]), int(ours[1]))
            known = before.get(node)
            if known is None or known[0] != particulars:
                text = b"%b %d %d %d %d" % (node, *particulars)
                digest = hashlib.blake2b(text, digest_size=STATE_HASH_BYTES).digest()
                known = (particulars, int.from_bytes(digest, "big"))
            self._tokens[node] = known
            total ^= known[1]
        return total.to_bytes(STATE_HASH_BYTES, "big")
