"""The door of a node: every request that is served here, and every one that is sent away, passes it.

It puts together what `access` decides one by one. `CapabilityHost.invoke` asks it before anything runs, whoever
the request came from; the router asks it before a candidate is tried, and `PeerCapabilities` once more, with the
address at hand, before anything is sent. So no retry, fallback or relay goes round it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from meshd.core.frames import WarmHint
from meshd.orchestrate.access import (
    AccessPolicy,
    Decision,
    distance_of,
    may_be_used_from,
    may_travel,
)
from meshd.orchestrate.callers import Caller
from meshd.orchestrate.distance import reach_of_host
from meshd_cms import NodeId
from meshd_naming import Name, NamingError, Offer, admits, parse_capability_name, parse_query
from meshd_plugins.api import Descriptor, Privacy, Refused


@dataclass(frozen=True, slots=True)
class Source:
    """Where a request came from, for the node that serves it."""

    caller: Caller
    peer: NodeId | None = None  # who sent it here; None: it was asked on this node
    away: Privacy = Privacy.LOCAL  # how far away that one is, by the connection it came on
    hint: WarmHint | None = None  # where else its beginning is warm, as it says


@dataclass(frozen=True, slots=True)
class Step:
    """One question that was asked, and its answer."""

    question: str  # "class of the request" | "class of the capability" | "name" | "rules"
    decision: Decision


class Guard:
    """Decides over requests at this node.

    Args:
        me: this node.
        policy: its rules.
        reach_of: how far away another node is: LAN or MESH.
        is_observer: this node serves nobody else.
    """

    def __init__(
        self,
        me: NodeId,
        policy: AccessPolicy,
        reach_of: Callable[[NodeId], Privacy],
        *,
        is_observer: bool = False,
    ) -> None:
        self.me = me
        self.policy = policy
        self._reach_of = reach_of
        self._is_observer = is_observer

    def admit(self, descriptor: Descriptor, name: str, privacy: Privacy, source: Source) -> None:
        """Let a request in that is to be served here.

        Args:
            descriptor: of the capability.
            name: that was asked for.
            privacy: class of the request.
            source: where it came from.

        Raises:
            Refused: `observer`, `privacy`, `caller` or `access`. Nothing was done.
        """
        if self._is_observer and source.peer is not None:
            raise Refused("this node is an observer and serves nothing", code="observer")
        for step in self.steps(descriptor, name, privacy, source):
            if step.decision.rule is not None:
                self.policy.count(step.decision)
            step.decision.enforce()

    def steps(
        self, descriptor: Descriptor, name: str, privacy: Privacy, source: Source
    ) -> Iterator[Step]:
        """What is asked of a request that is to be served here, in order."""
        away = self.distance(source)
        went = distance_of(descriptor.privacy, away)
        at = descriptor.name if went is Privacy.CLOUD else "the node that serves"
        yield Step("class of the request", may_travel(privacy, went, at=at))
        used = may_be_used_from(descriptor.privacy, away, descriptor.name)
        yield Step("class of the capability", used)
        capability = parse_capability_name(descriptor.name)
        caller = source.caller
        if source.peer is not None and caller.node != source.peer:
            yield Step("name", _is_asked_for(name, capability))
        yield Step("rules", self.policy.decide(capability, caller, privacy))

    def may_send(self, offer: Offer, caller: Caller, privacy: Privacy) -> Decision:
        """Whether a candidate may be tried; what it says itself may be narrower still."""
        local = offer.owner == self.me
        away = Privacy.LOCAL if local else self._reach_of(offer.owner)
        used = may_be_used_from(offer.privacy, away, offer.capability_id)
        if not used.allowed:
            return used
        travels = may_travel(privacy, distance_of(offer.privacy, away), at=offer.node_name)
        if not travels.allowed:
            return travels
        return self.policy.decide(
            offer.name, caller, privacy, server=None if local else offer.owner
        )

    def distance(self, source: Source) -> Privacy:
        """How far away a request came from: the farther of who sent it and where it was asked."""
        if source.peer is None:
            return Privacy.LOCAL
        origin = source.caller.node
        if origin in (source.peer, self.me):
            return source.away
        return max(source.away, self._reach_of(origin))


def check_departure(privacy: Privacy, host: str) -> None:
    """The last look before a request is sent to an address.

    Raises:
        Refused: `privacy`: it would leave the bounds of its class. Nothing was sent.
    """
    may_travel(privacy, reach_of_host(host), at=host or "whoever is there").enforce()


def _is_asked_for(asked: str, capability: Name) -> Decision:
    """Of a call that another node passed on: whether the capability is what was asked for."""
    try:
        fits = admits(parse_query(asked), capability)
    except NamingError:
        fits = False
    if fits:
        return Decision(allowed=True, why=f"{capability.path} is what was asked for")
    return Decision(
        allowed=False,
        why=f"{capability.path} is not what was asked for where the request comes from",
        code="caller",
    )
