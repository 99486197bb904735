"""From a name to the peers that can serve it, in order, with the reason for each place.

Order of classes: exact; the nearest ancestor that serves; `knowledge.gpt/general`; cloud. Only knowledge
falls back: an answer from a wider field is an answer, while another object or another computation is a
wrong one (decision 0007). What leaves the mesh is in the cloud class however well its name matches.

Resolution is local and has two steps. The *plan* depends on the index and the query only (classes,
operation, node, constraints) and is kept until the index changes. The *live* step looks at what changes
by the second: member states, exclusions, how far the request would travel, ages.

Invariant: every offer whose name is in a class of the query is either a candidate or left out for a
reason, except ancestors beyond the nearest that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import NamedTuple, TypeAlias

from meshd_cms.types import NodeId, node_id_text
from meshd_naming.errors import NotServed, printable
from meshd_naming.fields import Constraint, satisfies
from meshd_naming.grammar import Kind, Name
from meshd_naming.index import Index
from meshd_naming.nearest import closest_paths
from meshd_naming.offers import Offer
from meshd_plugins.api import Privacy, Value

GENERAL_LABELS = ("general",)
LEFT_OUT_MAX = 64  # reasons carried by one resolution
NEAREST_MAX = 3
PLANS_MAX = 256  # kept plans; all are dropped when it is reached
_LOCAL, _AWAY, _CLOUD = (
    frozenset({Privacy.LOCAL}),
    frozenset({Privacy.LAN, Privacy.MESH}),
    frozenset({Privacy.CLOUD}),
)
NODE_ID_PREFIX_CHARS_MIN = 6  # shorter ones name nodes only: 30 bits before two ids look alike


class Match(IntEnum):
    """Class of a candidate; the value is its priority, 0 best."""

    EXACT = 0
    ANCESTOR = 1
    GENERAL = 2
    CLOUD = 3


class PeerState(Enum):
    """What membership and soft state say of an owner."""

    ALIVE = "alive"
    SUSPECT = "suspected: it did not answer the last probes"
    DRAINING = "draining: it takes no new work"
    DEAD = "dead"
    LEFT = "gone: it left the mesh"
    UNKNOWN = "not a member now"


States: TypeAlias = "Callable[[NodeId], PeerState] | Mapping[NodeId, PeerState]"
"""Owner to state; an owner that a mapping lacks is UNKNOWN, but the local node is then ALIVE."""

Reach: TypeAlias = Callable[[NodeId], Privacy]
"""How far away a peer is: LAN or MESH."""


@dataclass(frozen=True, slots=True)
class ResolveOptions:
    """What the caller allows and wants."""

    operation: str | None = None  # value of `Operation`; None: any
    privacy: Privacy = Privacy.MESH  # how far the request may travel
    allow_general: bool = True  # may knowledge fall back to knowledge.gpt/general
    allow_cloud: bool = False  # may it go to a cloud capability; `privacy` must say CLOUD as well
    exclude: frozenset[NodeId] = frozenset()  # owners already tried
    modalities: tuple[str, ...] = ()  # what must be taken in beside text
    explain: bool = False  # fill `left_out` even when there are candidates


class Candidate(NamedTuple):
    """One offer that can serve. A named tuple: made by the hundred on the path of every request."""

    offer: Offer
    match: Match
    distance: int  # labels dropped from the query to reach the offer's name; 0 unless ANCESTOR
    weight: int  # relative capacity within its priority, 1..65535
    age_s: float  # of what is known about the offer; 0 for the local node
    local: bool  # on this node

    @property
    def priority(self) -> int:
        """0 is best; a higher one is for when all lower ones are full or fail."""
        return int(self.match)

    @property
    def reason(self) -> str:
        """Why it stands where it stands, for people."""
        why = self._why()
        rates = self.offer.rates
        decode = rates.decode_tokens_per_s if rates else 0.0
        speed = f"; {decode:.0f} tok/s decode" if decode > 0.0 else ""
        age = "on this node" if self.local else f"record {self.age_s:.1f} s old"
        return f"{why}{speed}; {age}"

    def _why(self) -> str:
        match self.match:
            case Match.EXACT:
                return "exact match"
            case Match.ANCESTOR:
                return f"nearest ancestor, {self.distance} up: {self.offer.name.path}"
            case Match.GENERAL:
                return "general knowledge, no nearer name"
            case Match.CLOUD:
                return "cloud, last resort"

    def to_value(self) -> dict[str, Value]:
        """As plain data."""
        return {
            "node": node_id_text(self.offer.owner),
            "node_name": self.offer.node_name,
            "capability": self.offer.capability_id,
            "name": self.offer.name.path,
            "match": self.match.name.lower(),
            "priority": self.priority,
            "weight": self.weight,
            "age_s": round(self.age_s, 3),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One offer that its name would admit, and why it cannot serve."""

    offer: Offer
    reason: str

    def to_value(self) -> dict[str, Value]:
        """As plain data."""
        return {
            "node": node_id_text(self.offer.owner),
            "node_name": self.offer.node_name,
            "capability": self.offer.capability_id,
            "name": self.offer.name.path,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Resolution:
    """The answer: candidates by priority, distance, weight (heaviest first), owner and id."""

    query: Name
    candidates: tuple[Candidate, ...]
    left_out: tuple[LeftOut, ...] = ()  # filled when explained, or when there is no candidate
    left_out_more: int = 0  # beyond LEFT_OUT_MAX
    nearest: tuple[str, ...] = ()  # names that exist, when there is no candidate

    def not_served(self) -> NotServed:
        """The error to raise when there is no candidate: what is missing, why, and what is near."""
        text = str(self.query)
        shown = "; ".join(f"{out.offer.node_name}: {out.reason}" for out in self.left_out[:3])
        more = len(self.left_out) + self.left_out_more - 3
        why = f" ({shown}{f'; and {more} more' if more > 0 else ''})" if shown else ""
        others = f" (also: {', '.join(self.nearest[1:])})" if len(self.nearest) > 1 else ""
        return NotServed(
            f'no peer serves "{text}" now{why}{others}',
            text=text,
            suggestion=self.nearest[0] if self.nearest else None,
        )

    def to_value(self) -> dict[str, Value]:
        """As plain data, for the edge and the CLI."""
        return {
            "query": str(self.query),
            "candidates": [candidate.to_value() for candidate in self.candidates],
            "left_out": [out.to_value() for out in self.left_out],
            "left_out_more": self.left_out_more,
            "nearest": list(self.nearest),
        }


class _Step(NamedTuple):
    """One offer that passed all that is static."""

    offer: Offer
    match: Match
    distance: int
    weight: int
    owner: NodeId  # of the offer, at hand
    local: bool
    only: Privacy | None  # serves only if its owner is exactly this far away; None: however far


@dataclass(frozen=True, slots=True)
class _Plan:
    """What does not change until the index does."""

    steps: tuple[_Step, ...]  # in order of candidates
    several: (
        int  # steps that are exact or ancestors, when ancestors at several distances are; else 0
    )
    left_out: tuple[LeftOut, ...]  # empty unless explained


class Resolver:
    """Resolves queries over one index. Not for concurrent use: one task owns it."""

    def __init__(
        self, index: Index, me: NodeId, states: States, reach: Reach | None = None
    ) -> None:
        """`reach` None: every peer counts as MESH away, so a request that may go to LAN stays here."""
        self._index = index
        self._me = me
        self._state: Callable[[NodeId], PeerState | None] = (
            states if callable(states) else states.get
        )
        self._reach = reach or _mesh_away
        self._plans: dict[object, _Plan] = {}
        self._plans_generation = index.generation

    def resolve(self, query: Name, options: ResolveOptions, now_s: float) -> Resolution:
        """Candidates for `query`, best first. Never raises; no state is left behind but kept plans."""
        plan = self._plan(query, options)
        candidates = self._candidates(plan, options.exclude, now_s)
        if candidates and not options.explain:
            return Resolution(query, candidates)
        if not options.explain:  # nothing found: people need the reasons after all
            return self.resolve(query, replace(options, explain=True), now_s)
        left_out = [*plan.left_out, *self._left_out(plan, options.exclude)]
        nearest = () if candidates else self._nearest(query)
        more = max(0, len(left_out) - LEFT_OUT_MAX)
        return Resolution(query, candidates, tuple(left_out[:LEFT_OUT_MAX]), more, nearest)

    def _plan(self, query: Name, options: ResolveOptions) -> _Plan:
        if self._plans_generation != self._index.generation or len(self._plans) >= PLANS_MAX:
            self._plans.clear()
            self._plans_generation = self._index.generation
        key = (
            query,
            options.operation,
            options.privacy,
            options.allow_general,
            options.allow_cloud,
            options.modalities,
            options.explain,
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _make_plan(self._index, self._me, query, options)
        return plan

    def _candidates(
        self, plan: _Plan, exclude: frozenset[NodeId], now_s: float
    ) -> tuple[Candidate, ...]:
        """The hot loop, a hundred turns in a mesh of a hundred: one look-up a question."""
        state, reach, alive = self._state, self._reach, PeerState.ALIVE
        confirmed_s = self._index.confirmed_s
        candidates = tuple(
            [
                tuple.__new__(  # pyright: ignore[reportUnknownMemberType] # half the constructor's time
                    Candidate,
                    (
                        offer,
                        match,
                        distance,
                        weight,
                        0.0 if local or (age_s := now_s - confirmed_s[owner]) < 0.0 else age_s,
                        local,
                    ),
                )
                for offer, match, distance, weight, owner, local, only in plan.steps
                if ((known := state(owner)) is alive or (known is None and local))
                and owner not in exclude
                and (only is None or reach(owner) is only)
            ]
        )
        return _nearest_ancestors(candidates, plan.several) if plan.several else candidates

    def _left_out(self, plan: _Plan, exclude: frozenset[NodeId]) -> list[LeftOut]:
        """The other half of `_candidates`, with reasons."""
        left_out: list[LeftOut] = []
        for step in plan.steps:
            state = self._state(step.owner)
            if state is None:
                state = PeerState.ALIVE if step.local else PeerState.UNKNOWN
            if state is not PeerState.ALIVE:
                left_out.append(LeftOut(step.offer, state.value))
            elif step.owner in exclude:
                left_out.append(LeftOut(step.offer, "already tried"))
            elif step.only is not None and (away := self._reach(step.owner)) is not step.only:
                left_out.append(LeftOut(step.offer, _too_far(step.offer, away)))
        return left_out

    def _nearest(self, query: Name) -> tuple[str, ...]:
        others = (pair for pair in self._index.paths() if pair[0] != query.path)
        return closest_paths(query.path, query.labels, others, NEAREST_MAX)


def _mesh_away(_owner: NodeId) -> Privacy:
    return Privacy.MESH


def _nearest_ancestors(candidates: tuple[Candidate, ...], within: int) -> tuple[Candidate, ...]:
    """Without the ancestors beyond the nearest; they are among the first `within`, nearest first."""
    ancestor = Match.ANCESTOR
    places = [place for place, one in enumerate(candidates[:within]) if one.match is ancestor]
    if not places:
        return candidates
    nearest = candidates[places[0]].distance
    end = next((place for place in places if candidates[place].distance != nearest), None)
    return candidates if end is None else candidates[:end] + candidates[places[-1] + 1 :]


def _make_plan(index: Index, me: NodeId, query: Name, options: ResolveOptions) -> _Plan:
    privacy_limits = [one for one in query.constraints if one.field == "privacy"]
    limits = [one for one in query.constraints if one.field != "privacy"]
    allowed = frozenset(
        level
        for level in Privacy
        if level <= options.privacy and all(satisfies(one, level) for one in privacy_limits)
    )
    steps: list[_Step] = []
    left_out: list[LeftOut] = []
    for match, distance, offer in _named(index, query):
        reason = _static_reason(offer, match, query.node, limits, options)
        local = offer.owner == me
        far = _distances(offer, local=local) & allowed
        if reason is None and far:
            only = None if local or match is Match.CLOUD or len(far) == 2 else next(iter(far))
            weight, owner = offer.weight, offer.owner
            steps.append(_Step(offer, match, distance, weight, owner, local, only))
        elif options.explain:
            text = (
                reason()
                if reason
                else _too_far(offer, min(_distances(offer, local=local), default=None))
            )
            left_out.append(LeftOut(offer, text))
    steps.sort(key=_place)
    distances = {step.distance for step in steps if step.match is Match.ANCESTOR}
    nearer = sum(step.match <= Match.ANCESTOR for step in steps)
    return _Plan(tuple(steps), nearer if len(distances) > 1 else 0, tuple(left_out))


def _distances(offer: Offer, *, local: bool) -> frozenset[Privacy]:
    """How far a request to this offer may turn out to travel, within what the offer itself admits.

    Never empty but for an offer of another node that may be called locally only.
    """
    if offer.privacy is Privacy.CLOUD:
        return _CLOUD
    if local:
        return _LOCAL
    return frozenset(level for level in _AWAY if level <= offer.privacy)


def _too_far(offer: Offer, away: Privacy | None) -> str:
    if away is None or away > offer.privacy:
        return f"may be called from {offer.privacy.name.lower()} only"
    return f"the request may not travel to {away.name.lower()}"


def _place(step: _Step) -> tuple[int, int, int, NodeId, str]:
    return (step.match, step.distance, -step.weight, step.offer.owner, step.offer.capability_id)


def _named(index: Index, query: Name) -> list[tuple[Match, int, Offer]]:
    """Every offer that the query's name admits, each once, with its class and distance."""
    found = [(Match.EXACT, 0, offer) for offer in index.lookup(query)]
    if query.kind is Kind.KNOWLEDGE and not query.is_pattern:
        for distance in range(1, len(query.labels)):
            ancestor = query.labels[:-distance]
            if ancestor != GENERAL_LABELS:
                found += [(Match.ANCESTOR, distance, one) for one in index.at(query.kind, ancestor)]
        if query.labels != GENERAL_LABELS:
            found += [(Match.GENERAL, 0, one) for one in index.at(query.kind, GENERAL_LABELS)]
    return [
        (Match.CLOUD, 0, offer) if offer.privacy is Privacy.CLOUD else (match, distance, offer)
        for match, distance, offer in found
    ]


def admits(query: Name, name: Name) -> bool:
    """Whether what is announced under `name` may serve `query`: exactly, or as what it falls back to."""
    if query.covers(name):
        return True
    if query.kind is not Kind.KNOWLEDGE or name.kind is not Kind.KNOWLEDGE or query.is_pattern:
        return False
    return name.labels == GENERAL_LABELS or query.labels[: len(name.labels)] == name.labels


def _static_reason(
    offer: Offer,
    match: Match,
    node: str | None,
    limits: list[Constraint],
    options: ResolveOptions,
) -> Callable[[], str] | None:
    """None when the offer passes; otherwise what makes the reason, so that it is made only if read."""
    if node is not None and not _is_node(offer, node):
        return lambda: f"not on {node}"
    if options.operation is not None and options.operation not in offer.operations:
        return lambda: f"cannot {options.operation}; it can {', '.join(offer.operations)}"
    if options.modalities and not set(options.modalities) <= set(offer.modalities):
        return lambda: f"takes in {printable(', '.join(offer.modalities))} only"
    for limit in limits:
        if not satisfies(limit, have := offer.value(limit.field)):
            return lambda: _unsatisfied(limit, have)
    if match is Match.GENERAL and not options.allow_general:
        return lambda: "general knowledge is not allowed for this request"
    if match is Match.CLOUD and not options.allow_cloud:
        return lambda: "cloud is not allowed for this request"
    return None


def _unsatisfied(limit: Constraint, have: Value) -> str:
    if have is None:
        return f"{limit} wanted; it does not say its {limit.field}"
    shown = str(list(have)) if isinstance(have, list | tuple) else str(have)
    return f"{limit} wanted; it has {printable(shown)}"


def _is_node(offer: Offer, node: str) -> bool:
    """Whether `node` (lower case) is the owner's name, or a long enough prefix of its id."""
    if offer.node_name.lower() == node:
        return True
    return len(node) >= NODE_ID_PREFIX_CHARS_MIN and node_id_text(offer.owner).startswith(node)
