"""What this node knows of the whole mesh, in the form that resolving and scheduling read.

It is a view: the store, membership and soft state are the truth, and events from the node core keep the
index in step with them. What changes without an event (ages, round trips) is read again at most once a
second. Loads come by two ways, gossip and the trailer of every reply; whichever was sampled later wins,
and both carry an age.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf

from meshd.core.effects import Address
from meshd.core.membership import MemberState, MemberView
from meshd.core.prefixes import Warm, unpack_warm
from meshd.core.scheduler import Key, Load
from meshd.orchestrate.access import Standing
from meshd.orchestrate.decoding import Malformed, mapping, sequence, text
from meshd.orchestrate.distance import reach_of_host
from meshd.orchestrate.records import (
    CAPABILITY_PREFIX,
    NODE_KEY,
    WARM_FIELD,
    capability_key,
    descriptor_from,
    load_from,
    model_key,
)
from meshd_cms import NodeId, Store
from meshd_naming import (
    Index,
    Kind,
    NamingError,
    Offer,
    PeerState,
    Resolution,
    ResolveOptions,
    Resolver,
    offer_from_descriptor,
    parse_query,
)
from meshd_plugins.api import Descriptor, Privacy, Value

LOAD_TRUST_S = 10.0  # older load is not shown and not used
REFRESH_S = 1.0  # ages and round trips are at most this much behind
OFFERS_PER_OWNER_MAX = 256  # of one record in the index; the store bounds records already


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A load with the moment at which its owner sampled it, on our clock."""

    value: Mapping[str, Value]
    at_s: float
    warm: Warm | None = None  # prefixes that it told of; None: it tells of none


class Catalogue:
    """Index, resolver, loads and addresses of the mesh, as one node sees them.

    Args:
        store: read only.
        members: all members as the node core sees them now, this node included.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        members: Callable[[], tuple[MemberView, ...]],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._read_members = members
        self._clock = clock
        self._index = Index()
        self._members: dict[NodeId, MemberView] = {}
        self._named: dict[NodeId, str] = {}
        self._bearers: defaultdict[str, list[NodeId]] = defaultdict(list)  # live, by name
        self._roles: dict[NodeId, str] = {}  # as they have shown
        self._states: dict[NodeId, PeerState] = {}
        self._asked: dict[NodeId, None] = {}
        self._loads: dict[NodeId, _Sampled] = {}
        self._refreshed_s = -inf
        self._resolver = Resolver(self._index, store.owner, self._states, self.reach_of)
        self.malformed = 0  # capabilities of others that could not be read
        self.members_changed()
        for owner in store.owners():  # from the snapshot
            self.record_changed(owner)

    # -- kept in step by events --------------------------------------------------------------------

    def members_changed(self) -> None:
        """Membership changed: read it again, and drop what is known of those who are forgotten."""
        self._members = {view.node: view for view in self._read_members()}
        self._named = {node: view.name for node, view in self._members.items()}
        self._bearers.clear()
        for view in self._members.values():
            if view.state.is_live:
                self._bearers[view.name].append(view.node)
        for node in [node for node in self._roles if node not in self._members]:
            del self._roles[node]
        self._states.clear()
        for node in self._members:
            self._states[node] = self._state(node)
        for owner in [owner for owner in self._loads if owner not in self._members]:
            del self._loads[owner]
        for owner in {offer.owner: None for offer in self._index.offers()}:
            if self._store.line(owner) is None:
                self._index.discard_owner(owner)

    def record_changed(self, owner: NodeId) -> None:
        """The record of an owner changed: index what it offers now."""
        before = {offer.capability_id for offer in self._index.owned(owner)}
        node = self._store.get(owner, NODE_KEY)
        now: set[str] = set()
        for key, value in self._store.items(owner, CAPABILITY_PREFIX)[:OFFERS_PER_OWNER_MAX]:
            try:
                offer = self._offer(owner, node, value)
            except (Malformed, NamingError):
                self.malformed += 1
                continue
            if key == capability_key(offer.capability_id) and self._index.put(offer):
                now.add(offer.capability_id)
            else:
                self.malformed += 1
        for gone in sorted(before - now):
            self._index.discard(owner, gone)

    def note_load(self, owner: NodeId, load: Value, age_s: float = 0.0) -> None:
        """A load sample arrived, by gossip or on a reply; an older one than ours is passed over."""
        if not isinstance(load, Mapping):
            return
        at_s = self._clock() - age_s
        known = self._loads.get(owner)
        if known is None or at_s >= known.at_s:
            self._loads[owner] = _Sampled(load, at_s, unpack_warm(load.get(WARM_FIELD)))
            if owner in self._members:
                self._states[owner] = self._state(owner)

    def _refresh(self) -> None:
        now_s = self._clock()
        if now_s - self._refreshed_s < REFRESH_S:
            return
        self._refreshed_s = now_s
        self._members = {view.node: view for view in self._read_members()}
        for owner in tuple(self._index.confirmed_s):
            if (age_s := self._store.age_s(owner, now_s)) is not None:
                self._index.confirm(owner, now_s - age_s)

    # -- reading -----------------------------------------------------------------------------------

    def resolve(self, name: str, options: ResolveOptions) -> Resolution:
        """Candidates for a name; no packet leaves the node.

        Raises:
            NamingError: the name is malformed.
        """
        self._refresh()
        return self._resolver.resolve(parse_query(name), options, self._clock())

    def load_of(self, key: Key) -> Load | None:
        """What is known of the load of one capability of one node; None when it is too old."""
        owner, capability_id = key
        self._asked[owner] = None
        shown = self.load_shown(owner)
        if shown is None:
            return None
        load, age_s = shown
        try:
            return replace(load_from(load, capability_id), age_s=age_s)
        except Malformed:
            return None

    def take_asked(self) -> tuple[NodeId, ...]:
        """The nodes whose load was asked for since the last call: those that we route to."""
        asked = tuple(self._asked)
        self._asked.clear()
        return asked

    def load_shown(self, owner: NodeId) -> tuple[Mapping[str, Value], float] | None:
        """The last load of a node with its age in seconds, None when there is none that counts."""
        sampled = self._loads.get(owner)
        if sampled is None or (age_s := self._clock() - sampled.at_s) > LOAD_TRUST_S:
            return None
        return sampled.value, age_s

    def warm_of(self, owner: NodeId) -> tuple[Warm, float] | None:
        """The warm prefixes that a node last told of, and when it did; None when that is too long ago."""
        sampled = self._loads.get(owner)
        if sampled is None or sampled.warm is None:
            return None
        return None if self._clock() - sampled.at_s > LOAD_TRUST_S else (sampled.warm, sampled.at_s)

    def holders(self, kv_key: str) -> tuple[Offer, ...]:
        """What is offered by nodes that are reached, draining ones too, for whom such KV state is of use."""
        reached = (PeerState.ALIVE, PeerState.DRAINING)
        return tuple(
            offer
            for offer in self._index.offers()
            if offer.kv_key == kv_key and self._states.get(offer.owner) in reached
        )

    def load_age_of(self, owner: NodeId) -> float | None:
        """Seconds since the owner sampled the last load that we know, however old; None without one."""
        sampled = self._loads.get(owner)
        return None if sampled is None else max(0.0, self._clock() - sampled.at_s)

    def round_trip_of(self, owner: NodeId) -> float | None:
        """Seconds, as membership last measured; 0.0 to this node itself, None when it did not."""
        member = self._members.get(owner)
        if member is None:
            return None
        return 0.0 if member.is_self else member.round_trip_s

    def address_of(self, owner: NodeId) -> Address | None:
        """Where a member is reached now."""
        member = self._members.get(owner)
        return member.address if member else None

    def members(self) -> tuple[MemberView, ...]:
        """All members, this node included, by node id."""
        self._refresh()
        return tuple(self._members.values())

    def offers(self) -> tuple[Offer, ...]:
        """Everything that is offered in the mesh, whoever is reachable."""
        return tuple(self._index.offers())

    def age_of(self, owner: NodeId) -> float:
        """Seconds since the owner's record moved or was confirmed as current; 0.0 for our own."""
        return self._store.age_s(owner, self._clock()) or 0.0

    def state_of(self, owner: NodeId) -> PeerState:
        """What membership and load say of a node."""
        return self._states.get(owner, PeerState.UNKNOWN)

    def summary_of(self, offer: Offer) -> str:
        """The line that a capability's owner wrote about it, for people."""
        value = self._store.get(offer.owner, capability_key(offer.capability_id))
        summary = value.get("summary") if isinstance(value, Mapping) else None
        return summary if isinstance(summary, str) else ""

    def data_names(self) -> tuple[str, ...]:
        """Names of the data objects that somebody reachable holds."""
        return tuple(
            sorted(
                {
                    offer.name.path
                    for offer in self._index.offers()
                    if offer.name.kind is Kind.DATA
                    and self._states.get(offer.owner) is PeerState.ALIVE
                }
            )
        )

    def reach_of(self, owner: NodeId) -> Privacy:
        """How far away a node is, by the address where it is reached: LAN or MESH."""
        address = self.address_of(owner)
        return reach_of_host(address[0]) if address else Privacy.MESH

    def name_of(self, node: NodeId) -> str:
        """What a member calls itself; "" for whoever is none."""
        return self._named.get(node, "")

    def is_live(self, node: NodeId) -> bool:
        """Whether it is a member that is not dead or gone."""
        member = self._members.get(node)
        return member is not None and member.state.is_live

    def standing_of(self, node: NodeId) -> Standing:
        """What is known of a node, for rules that name it; its role is known once it has shown it."""
        name = self._named.get(node, "")
        shared = any(bearer != node for bearer in self._bearers[name])
        return Standing(name, shared, self._roles.get(node, ""))

    def note_role(self, node: NodeId, role: str) -> bool:
        """A node has shown its role, in the certificate of a connection; whether that is news."""
        if self._roles.get(node) == role:
            return False
        self._roles[node] = role
        return True

    # -- inside ------------------------------------------------------------------------------------

    def _offer(self, owner: NodeId, node: Value, value: Value) -> Offer:
        table = mapping(value, "cap")
        digest = table.get("model")
        model = self._store.get(owner, model_key(digest)) if isinstance(digest, str) else None
        descriptor: Descriptor = descriptor_from(table, model)
        facts: Mapping[str, Value] = mapping(node, "node") if node is not None else {}
        age_s = self._store.age_s(owner, self._clock())
        return offer_from_descriptor(
            owner,
            text(facts.get("name", ""), "name"),
            descriptor,
            updated_at_s=self._clock() - (age_s or 0.0),
            zone=text(facts.get("zone", ""), "zone"),
            labels=tuple(
                text(label, "labels") for label in sequence(facts.get("labels", ()), "labels")
            ),
        )

    def _state(self, node: NodeId) -> PeerState:
        match self._members[node].state:
            case MemberState.ALIVE:
                sampled = self._loads.get(node)
                draining = sampled is not None and sampled.value.get("draining") is True
                return PeerState.DRAINING if draining else PeerState.ALIVE
            case MemberState.SUSPECT:
                return PeerState.SUSPECT
            case MemberState.DEAD:
                return PeerState.DEAD
            case MemberState.LEFT:
                return PeerState.LEFT
