"""May this caller use this capability for a request of this class? Pure, and each answer says why.

Two questions, both asked at the node that serves, and the same two at the node that asks:

*How far would it travel.* A request is never given to anybody further away than its class, nor to a capability
of the cloud unless its class is `cloud`. A capability is never used from further away than its own class says.
Distance is LOCAL for this node, LAN or MESH for another, CLOUD for what leaves the mesh.

*Whom do the rules let in.* They are looked at in order; the first that is about the capability's name, the
caller and the request's class decides. Where some rule is about the capability and none decides, it is denied.
Where none is about it, it is open to all.

What is not known is held against the caller: a name that two members carry, or a role that nobody has shown, is
not enough to be allowed, and is enough to be denied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final, assert_never

from meshd.config.access import ANY_WORD, AccessRule, CallerKind, CallerTerm, Effect
from meshd.orchestrate.callers import KEY_PREFIX, LOCAL_PRINCIPAL, LOOPBACK_PRINCIPAL, Caller
from meshd_cms import NodeId
from meshd_naming import Name
from meshd_plugins.api import Privacy, Refused

ACCESS_CODE: Final = "access"
PRIVACY_CODE: Final = "privacy"
KEPT_MAX: Final = 1024
"""Decisions kept."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer, and why."""

    allowed: bool
    why: str  # for people
    code: str = ""  # of the refusal: ACCESS_CODE or PRIVACY_CODE
    rule: int | None = None  # the rule that decided, by its place

    def enforce(self) -> None:
        """Raise Refused unless it is allowed."""
        if not self.allowed:
            raise Refused(self.why, code=self.code)


OPEN: Final = Decision(allowed=True, why="no rule is about it, so it is open to all")


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known here of the node where somebody asks."""

    name: str = ""
    is_name_shared: bool = False  # another member carries the same name
    role: str = ""  # "" where it has not shown one


class _Fit(IntEnum):
    NO = 0
    UNSURE = 1
    YES = 2


@lru_cache(maxsize=KEPT_MAX)
def may_travel(privacy: Privacy, distance: Privacy, *, at: str) -> Decision:
    """Whether a request of this class may go this far; `at` names what is there, for people."""
    if distance <= privacy:
        return Decision(allowed=True, why=f"{at} is not further away than {_word(privacy)}")
    return Decision(
        allowed=False,
        why=f"the request may not travel beyond {_word(privacy)}, and {at} is {_PLACES[distance]}",
        code=PRIVACY_CODE,
    )


@lru_cache(maxsize=KEPT_MAX)
def may_be_used_from(offered: Privacy, distance: Privacy, capability: str) -> Decision:
    """Whether a capability of this class may be used from this far away."""
    if distance <= offered:
        return Decision(allowed=True, why=f"{capability} may be used from {_word(offered)}")
    return Decision(
        allowed=False,
        why=f"{capability} may be called from {_word(offered)} only",
        code=PRIVACY_CODE,
    )


def distance_of(offered: Privacy, away: Privacy) -> Privacy:
    """How far a request travels that a capability of class `offered` on a node `away` serves."""
    return Privacy.CLOUD if offered is Privacy.CLOUD else away


_PLACES: Final = {
    Privacy.LOCAL: "on this node",
    Privacy.LAN: "elsewhere on the LAN",
    Privacy.MESH: "beyond the LAN",
    Privacy.CLOUD: "outside the mesh",
}


class AccessPolicy:
    """The rules of one node.

    Args:
        rules: in their order.
        me: this node.
        standing_of: what is known of another one.
    """

    def __init__(
        self,
        rules: Sequence[AccessRule],
        me: NodeId,
        standing_of: Callable[[NodeId], Standing],
    ) -> None:
        self.rules = tuple(rules)
        self.hits = [0] * len(rules)  # calls and asks that each rule decided
        self._me = me
        self._standing_of = standing_of
        self._kept: dict[tuple[str, NodeId, str, Privacy, NodeId], Decision] = {}

    def members_changed(self) -> None:
        """Who is who may be another matter now."""
        self._kept.clear()

    def decide(
        self, capability: Name, caller: Caller, privacy: Privacy, *, server: NodeId | None = None
    ) -> Decision:
        """What the rules say.

        Args:
            capability: the name it is announced under.
            caller: who asks.
            privacy: the class of the request.
            server: the node that would serve, when that is not this one. Then words such as `local` and
                `mesh` also fit as that node will understand them: its rules may be a copy of these.
        """
        if not self.rules:
            return OPEN
        at = self._me if server is None else server
        key = (capability.path, caller.node, caller.principal, privacy, at)
        decision = self._kept.get(key)
        if decision is None:
            if len(self._kept) >= KEPT_MAX:
                self._kept.clear()
            places = tuple(dict.fromkeys((at, self._me)))
            decision = self._kept[key] = self._evaluate(capability, caller, privacy, places)
        return decision

    def count(self, decision: Decision) -> None:
        """A call or an ask was decided by this."""
        if decision.rule is not None:
            self.hits[decision.rule - 1] += 1

    def about(self, capability: Name) -> tuple[AccessRule, ...]:
        """The rules that are about a capability."""
        return tuple(rule for rule in self.rules if rule.name.covers(capability))

    def _evaluate(
        self, capability: Name, caller: Caller, privacy: Privacy, places: tuple[NodeId, ...]
    ) -> Decision:
        about = self.about(capability)
        if not about:
            return OPEN
        standing = self._standing_of(caller.node)
        for rule in about:
            if privacy not in rule.privacy:
                continue
            fit = max(_fit(term, caller, standing, places) for term in rule.callers)
            match rule.effect:
                case Effect.ALLOW if fit is _Fit.YES:
                    return Decision(allowed=True, why=_said(rule), rule=rule.number)
                case Effect.DENY if fit is not _Fit.NO:
                    why = _said(rule) + (", as far as is known" if fit is _Fit.UNSURE else "")
                    return Decision(allowed=False, why=why, code=ACCESS_CODE, rule=rule.number)
                case Effect.ALLOW | Effect.DENY:
                    pass
                case _:
                    assert_never(rule.effect)
        numbers = ", ".join(str(rule.number) for rule in about)
        return Decision(
            allowed=False,
            why=f"access to {capability.path} is for others: of the rules about it ({numbers}) none"
            " allows this caller and class",
            code=ACCESS_CODE,
        )


def _fit(term: CallerTerm, caller: Caller, standing: Standing, places: Iterable[NodeId]) -> _Fit:
    """Whether a caller is the one that a word means; `places`: what counts as `here`."""
    here = caller.node in places
    match term.kind:
        case CallerKind.ANYONE:
            return _Fit.YES
        case CallerKind.LOCAL:
            own = caller.principal in (LOCAL_PRINCIPAL, LOOPBACK_PRINCIPAL)
            return _certain(here and own)
        case CallerKind.MESH:
            return _certain(any(caller.node != place for place in places))
        case CallerKind.ROLE:
            return _certain(standing.role == term.word) if standing.role else _Fit.UNSURE
        case CallerKind.NODE:
            return _fit_node(term.word, term.node, caller, standing)
        case CallerKind.KEY:
            return _fit_key(term, caller, standing, here=here)
        case _:
            assert_never(term.kind)


def _fit_key(term: CallerTerm, caller: Caller, standing: Standing, *, here: bool) -> _Fit:
    if not caller.principal.startswith(KEY_PREFIX):
        return _Fit.NO
    if term.word not in (ANY_WORD, caller.principal.removeprefix(KEY_PREFIX)):
        return _Fit.NO
    if term.at == ANY_WORD:
        return _Fit.YES
    return _fit_node(term.at, term.node, caller, standing) if term.at else _certain(here)


def _fit_node(name: str, node: NodeId | None, caller: Caller, standing: Standing) -> _Fit:
    if node is not None:
        return _certain(caller.node == node)
    if standing.name != name:
        return _Fit.NO if standing.name else _Fit.UNSURE
    return _Fit.UNSURE if standing.is_name_shared else _Fit.YES


def _certain(fits: object) -> _Fit:
    return _Fit.YES if fits else _Fit.NO


def _said(rule: AccessRule) -> str:
    verb = "allows" if rule.effect is Effect.ALLOW else "denies"
    return f"rule {rule.number} ({rule.name}) {verb} it"


def _word(privacy: Privacy) -> str:
    return privacy.name.lower()
