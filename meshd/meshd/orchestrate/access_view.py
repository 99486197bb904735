"""Rules, decisions and the audit trail for people; and what one node tells another of its decisions.

A node asks another how it would decide about itself only: the answer says no more than trying would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Final

import trio

from meshd.core.frames import CallHeader
from meshd.orchestrate.access import Decision
from meshd.orchestrate.access_guard import Source, Step
from meshd.orchestrate.access_parts import AccessParts
from meshd.orchestrate.audit import Wanted
from meshd.orchestrate.callers import LOCAL_PRINCIPAL, PRINCIPAL, Caller
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.decoding import Malformed, count, mapping, sequence, text, typed
from meshd.orchestrate.host import CapabilityHost
from meshd.orchestrate.lookout import find_node
from meshd.shell.streams import (
    IncomingCall,
    PeerStreams,
    PeerUnreachable,
    RemoteFailed,
    RemoteRefused,
    StreamError,
)
from meshd_cms import NodeId, node_id_text
from meshd_naming import Name, parse_capability_name
from meshd_plugins.api import BadRequest, Descriptor, Failed, Privacy, Value

ACCESS_ID: Final = "meshd/access"
"""Calls to it ask how a node would decide; a capability's id is NAME#DIGEST."""
CHECK_S: Final = 5.0
STEPS_MAX: Final = 32
WHY_CHARS_MAX: Final = 300

_CHECK: Final = "check"
_NAME, _PRINCIPAL, _CLASS, _STEPS = "n", "p", "c", "s"


def is_access_question(call: IncomingCall) -> bool:
    """Whether a call asks how this node would decide."""
    return call.header.capability_id == ACCESS_ID


class AccessView:
    """Shows and explains what `AccessParts` decide and record.

    Args:
        parts: of this node.
        host: what it serves.
        catalogue: who else there is.
        streams: to ask another node.
        default_privacy: class of an ask that names none.
        role: of this node.
    """

    def __init__(
        self,
        parts: AccessParts,
        host: CapabilityHost,
        catalogue: Catalogue,
        streams: PeerStreams,
        *,
        default_privacy: Privacy,
        role: str,
    ) -> None:
        self._parts = parts
        self._host = host
        self._catalogue = catalogue
        self._streams = streams
        self._default_privacy = default_privacy
        self._role = role
        self._me = parts.guard.me

    # -- for people ------------------------------------------------------------------------------------

    def access(self) -> Mapping[str, Value]:
        """The rules in force, what each is about here, and how often it decided."""
        policy = self._parts.policy
        served = self._host.descriptors()
        names = [parse_capability_name(descriptor.name) for descriptor in served]
        return {
            "node": node_id_text(self._me),
            "role": self._role,
            "default_privacy": _word(self._default_privacy),
            "rules": [
                {
                    "rule": rule.number,
                    "name": str(rule.name),
                    "effect": rule.effect.value,
                    "callers": [str(term) for term in rule.callers],
                    "privacy": [_word(level) for level in sorted(rule.privacy)],
                    "comment": rule.comment,
                    "decided": policy.hits[rule.number - 1],
                    "about_here": sorted({each.path for each in names if rule.name.covers(each)}),
                }
                for rule in policy.rules
            ],
            "capabilities": [
                {
                    "capability": descriptor.id,
                    "privacy": _word(descriptor.privacy),
                    "rules": [rule.number for rule in policy.about(name)],
                }
                for descriptor, name in zip(served, names, strict=True)
            ],
        }

    async def check(self, name: str, caller: str, privacy: str, at: str) -> Mapping[str, Value]:
        """How a request would be decided, question by question.

        Args:
            name: of a capability.
            caller: `local`, `loopback`, `key:NAME`, one of these with `@NODE`, or a node.
            privacy: class of the request; "" for this node's default.
            at: the node that would serve; "" for this one.

        Raises:
            NamingError: the name is malformed.
            BadRequest, Refused: there is no such caller, class or node.
            Failed: the other node did not answer.
        """
        wanted = parse_capability_name(name)
        level = self._class(privacy)
        asks = self._caller(caller)
        members = {view.node: view for view in self._catalogue.members()}
        server = find_node(at, members) if at else self._me
        here = self._catalogue.name_of(self._me)
        if server == self._me:
            steps = [_step_value(step, here) for step in self._served_here(wanted, level, asks)]
        elif asks.node != self._me:
            raise BadRequest(
                f"how {at} decides about callers of another node is to be asked on that one: run it there",
                code="other_node",
            )
        else:
            steps = [_step_value(step, here) for step in self._sent(wanted, level, asks, server)]
            steps += await self._asked(wanted, level, asks, server, members[server].address)
        refused = next((step for step in steps if not step["allowed"]), None)
        return {
            "name": wanted.path,
            "caller": str(asks),
            "privacy": _word(level),
            "served_by": self._catalogue.name_of(server),
            "allowed": refused is None,
            "why": (refused or steps[-1])["why"] if steps else "there is nothing to decide",
            "steps": list[Value](steps),
        }

    def record(self, kind: str, /, **fields: Value) -> None:
        """Note in the trail that something happened; never content."""
        self._parts.audit.record(kind, **fields)

    async def audit(self, wanted: Wanted) -> Mapping[str, Value]:
        """`{"audit": [...]}`: the newest lines that are wanted, oldest first.

        Raises:
            Failed: the files cannot be read.
        """
        try:
            lines = await self._parts.audit.read(wanted)
        except OSError as error:
            raise Failed(f"the audit trail cannot be read: {error.strerror}") from error
        return {"audit": lines, "counters": asdict(self._parts.audit.statistics)}

    async def audit_verify(self) -> Mapping[str, Value]:
        """Whether the trail is as it was written. Raises Failed as `audit`."""
        try:
            return (await self._parts.audit.verify()).to_value()
        except OSError as error:
            raise Failed(f"the audit trail cannot be read: {error.strerror}") from error

    # -- for other nodes -------------------------------------------------------------------------------

    async def serve(self, call: IncomingCall) -> Value:
        """Answer a node that asks how this one would decide about it.

        Raises:
            BadRequest: the question is malformed, or none that is known.
        """
        await trio.lowlevel.checkpoint()
        if call.header.operation != _CHECK:
            raise BadRequest("this node knows no such question", code="unknown_question")
        try:
            asked = mapping(call.body, "question")
            name = parse_capability_name(text(asked.get(_NAME), "name"))
            principal = text(asked.get(_PRINCIPAL), "principal")
            level = Privacy(count(asked.get(_CLASS), "class"))
        except ValueError as error:
            raise BadRequest(
                f"the question is malformed: {error}", code="malformed_call"
            ) from error
        if PRINCIPAL.fullmatch(principal) is None:
            raise BadRequest("the principal is malformed", code="malformed_call")
        steps = self._served_here(name, level, Caller(call.peer, principal))
        return {_STEPS: [[s.question, s.decision.allowed, s.decision.why] for s in steps]}

    # -- inside ----------------------------------------------------------------------------------------

    def _served_here(self, name: Name, level: Privacy, caller: Caller) -> list[Step]:
        """What would be asked of a request that this node is to serve."""
        source = Source(caller)
        if caller.node != self._me:
            source = Source(caller, caller.node, self._catalogue.reach_of(caller.node))
            if self._role == "observer":
                observes = "this node is an observer and serves nothing"
                return [Step("role", Decision(allowed=False, why=observes, code="observer"))]
        served = self._served(name)
        if served is None:
            nothing = Decision(allowed=True, why=f"{name.path} is not served here now")
            rules = self._parts.policy.decide(name, caller, level)
            return [Step("capability", nothing), Step("rules", rules)]
        return list(self._parts.guard.steps(served, name.path, level, source))

    def _sent(self, name: Name, level: Privacy, caller: Caller, server: NodeId) -> Iterable[Step]:
        """What this node asks itself before it tries that one."""
        for offer in self._catalogue.offers():
            if offer.owner == server and offer.name == name:
                yield Step("before it is sent", self._parts.guard.may_send(offer, caller, level))
                return
        nothing = f"{name.path} is not announced by {self._catalogue.name_of(server)}"
        yield Step("capability", Decision(allowed=True, why=nothing))

    async def _asked(
        self, name: Name, level: Privacy, caller: Caller, server: NodeId, address: tuple[str, int]
    ) -> list[dict[str, Value]]:
        """What the other node says."""
        header = CallHeader(
            request_id="access",
            name=ACCESS_ID,
            capability_id=ACCESS_ID,
            operation=_CHECK,
            remaining_s=CHECK_S,
        )
        question: Value = {_NAME: name.path, _PRINCIPAL: caller.principal, _CLASS: int(level)}
        at = self._catalogue.name_of(server)
        try:
            with trio.fail_after(CHECK_S):
                async with self._streams.call(server, address, header, question) as call:
                    while await call.receive() is not None:
                        pass
                    return _steps_from(call.trailer, at)
        except (RemoteRefused, RemoteFailed, PeerUnreachable, StreamError) as error:
            raise Failed(f"{at} did not say: {error}", code="unreachable") from error
        except trio.TooSlowError as error:
            raise Failed(f"{at} did not answer", code="unreachable") from error
        except Malformed as error:
            raise Failed(
                f"{at} answered what makes no sense: {error}", code="peer_fault"
            ) from error

    def _served(self, name: Name) -> Descriptor | None:
        return next((one for one in self._host.descriptors() if one.name == name.path), None)

    def _class(self, word: str) -> Privacy:
        if not word:
            return self._default_privacy
        if word.upper() not in Privacy.__members__:
            known = ", ".join(map(_word, Privacy))
            raise BadRequest(
                f"{word!r} is no privacy class: there are {known}", code="invalid_value"
            )
        return Privacy[word.upper()]

    def _caller(self, word: str) -> Caller:
        principal, at_sign, node = (word or LOCAL_PRINCIPAL).partition("@")
        members = {view.node: view for view in self._catalogue.members()}
        if PRINCIPAL.fullmatch(principal) is None:
            if at_sign or ":" in word:
                raise BadRequest(
                    f"{word!r} is no caller: there are local, loopback, key:NAME, each with @NODE if it"
                    " is at another node, and nodes",
                    code="invalid_value",
                )
            return Caller(find_node(word, members))
        return Caller(find_node(node, members) if at_sign else self._me, principal)


def _step_value(step: Step, at: str) -> dict[str, Value]:
    decision = step.decision
    return {
        "at": at,
        "question": step.question,
        "allowed": decision.allowed,
        "why": decision.why,
        "rule": decision.rule,
    }


def _steps_from(trailer: Value, at: str) -> list[dict[str, Value]]:
    steps: list[dict[str, Value]] = []
    for item in sequence(mapping(trailer, "answer").get(_STEPS), "steps")[:STEPS_MAX]:
        question, allowed, why = (*sequence(item, "step"), None, None, None)[:3]
        steps.append(
            {
                "at": at,
                "question": text(question, "question")[:WHY_CHARS_MAX],
                "allowed": typed(allowed, bool, "allowed"),
                "why": text(why, "why")[:WHY_CHARS_MAX],
                "rule": None,
            }
        )
    if not steps:
        raise Malformed("steps: there are none")
    return steps


def _word(privacy: Privacy) -> str:
    return privacy.name.lower()
