"""KV state from peer to peer: who has computed a long beginning hands it to who serves what follows.

The calls travel on the peer streams under an id that no capability can have. The node that serves a request
pulls (`meshd.orchestrate.prefix_fetcher`); nothing is pushed. It asks with the passport of the request at hand.

The holder believes nothing that the asking peer says of itself. Who asks is who its passport names; a state is
given for a request of the very caller that it was made for, to a node where a request of its class may go, if
the holder's own rules would serve that caller that capability.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from meshd.core.handoff import HandoffConfig
from meshd.core.prefixes import TAG_BYTES
from meshd.orchestrate.access import may_travel
from meshd.orchestrate.access_guard import Guard, Source
from meshd.orchestrate.audit import Audit
from meshd.orchestrate.callers import Caller, Passports, id_text
from meshd.orchestrate.decoding import Malformed, count, mapping, typed
from meshd.orchestrate.distance import reach_of_host
from meshd.orchestrate.host import CapabilityHost
from meshd.shell.streams import IncomingCall
from meshd_cms import NodeId
from meshd_plugins.api import (
    BadRequest,
    CapabilityError,
    Descriptor,
    Failed,
    Logger,
    PrefixExport,
    PrefixHead,
    PrefixHolder,
    Privacy,
    Refused,
    Value,
)

KV_ID: Final = "meshd/kv"  # a capability's id is NAME#DIGEST
EXPORT: Final = "export"
GIVEN_MAX: Final = 2
"""States that are handed out at once: each is held by its capability, and some of it here, while the line is
slow."""
HOLDERS_MAX: Final = 4
"""Capabilities that are asked for one state: the names of a model, or a model that is loaded twice."""
NOT_WARM: Final = "not_warm"
PIECE_BYTES: Final = 128 * 1024
"""Of a state in one frame. Up: less work a byte; frames of other calls wait longer behind one."""

TAG_FIELD, KEY_FIELD, MOST_FIELD = "t", "k", "m"  # of a question
IDS_FIELD, SIZE_FIELD, DIGEST_FIELD, CLASS_FIELD = "i", "b", "d", "p"  # of a head
DIGEST_BYTES: Final = 32


def is_handoff(call: IncomingCall) -> bool:
    """Whether a call is one of these, and no capability's."""
    return call.header.capability_id == KV_ID


@dataclass(slots=True)
class HandoffStatistics:
    """What was handed over so far."""

    given: int = 0
    given_bytes: int = 0
    given_refused: int = 0
    fetched_bytes: int = 0
    fetched_tokens: int = 0
    fetches: dict[str, int] = field(default_factory=dict[str, int])  # by outcome or `Reason`

    def count(self, outcome: str) -> None:
        """One more fetch that ended so, or was not begun for that reason."""
        self.fetches[outcome] = self.fetches.get(outcome, 0) + 1


@dataclass(frozen=True, slots=True)
class _Question:
    tag: bytes
    kv_key: str
    bytes_max: int


class PrefixServer:
    """Hands out what is warm here.

    Args:
        host: has the capabilities.
        guard: knows the rules of this node.
        passports: say who asks.
        audit: is told what left: a state says as much as the messages that it was made from.
        config: whether it hands out at all.
        statistics: counted here.
        log: one line for each call.
        name_of: what a peer is called, for the audit.
    """

    def __init__(
        self,
        host: CapabilityHost,
        guard: Guard,
        passports: Passports,
        audit: Audit,
        config: HandoffConfig,
        statistics: HandoffStatistics,
        log: Logger,
        name_of: Callable[[NodeId], str] = lambda _node: "",
    ) -> None:
        self._audit = audit
        self._config = config
        self._name_of = name_of
        self._host = host
        self._guard = guard
        self._passports = passports
        self._statistics = statistics
        self._log = log
        self._running = 0

    async def serve(self, call: IncomingCall) -> Value:
        """Hand one state out; returns the trailer. A node that drains still does.

        Raises:
            Refused: `busy`, `not_warm`, `too_large`; `caller`, `privacy`, `access`: it may not have it.
            BadRequest: `malformed_call`.
            Failed: it broke.
        """
        began_s = trio.current_time()
        outcome = "cancelled"
        caller: Caller | None = None
        try:
            caller = self._passports.read(call.header, call.peer)
            if not self._config.enable:
                raise Refused("this node hands nothing over", code="unsupported")
            if self._running >= GIVEN_MAX:
                raise Refused(f"{GIVEN_MAX} states are being handed out", code="busy")
            self._running += 1
            try:
                trailer = await self._given(call, caller)
            finally:
                self._running -= 1
            outcome = "ok"
            self._statistics.given += 1
            return trailer
        except CapabilityError as error:
            outcome = error.code
            self._statistics.given_refused += 1
            raise
        finally:
            self._statistics.given_bytes += call.sent_bytes
            self._log.info(
                "prefix.given",
                request_id=call.header.request_id,
                peer=id_text(call.peer),
                outcome=outcome,
                bytes=call.sent_bytes,
                total_ms=round((trio.current_time() - began_s) * 1e3, 1),
            )
            self._note(call, caller, outcome)

    def _note(self, call: IncomingCall, caller: Caller | None, outcome: str) -> None:
        classes = {int(level): level.name.lower() for level in Privacy}
        self._audit.record(
            "served",
            to=id_text(call.peer),
            to_name=self._name_of(call.peer),
            capability=KV_ID,
            privacy=classes.get(call.header.privacy, "unknown"),
            caller=str(caller) if caller is not None else "unproven",
            request=call.header.request_id,
            bytes=call.sent_bytes,
            pieces=1,
            outcome=outcome,
        )

    async def _given(self, call: IncomingCall, caller: Caller) -> Value:
        question, privacy = _question(call)
        source = Source(caller, call.peer, reach_of_host(call.host))
        away = self._guard.distance(source)
        refusal = Refused("it is not warm here", code=NOT_WARM)
        for descriptor, holder in self._holders(question):
            try:
                self._guard.admit(descriptor, call.header.name, privacy, source)
                async with holder.export_prefix(question.tag, str(caller), away) as export:
                    _check_may_have(export.head, question, str(caller), away)
                    with _within(self._config.given_s_max, "it takes too long"):
                        await call.send(_head_value(export.head))
                        return {SIZE_FIELD: await self._send(export, call)}
            except Refused as refused:
                if call.sent_bytes:
                    raise Failed(refused.message, code="contract") from refused
                refusal = refused if refused.code != NOT_WARM else refusal
        raise refusal

    async def _send(self, export: PrefixExport, call: IncomingCall) -> int:
        """Send a state, one piece of it in hand: the next is asked for when the line has taken this one."""
        sent_bytes = 0
        while (data := await export.receive()) is not None:
            sent_bytes += len(data)
            if sent_bytes > export.head.size_bytes:
                raise Failed("the state is longer than its head says", code="contract")
            view = memoryview(data)
            for at in range(0, len(data), PIECE_BYTES):
                with _within(self._config.taken_s_max, "the node that asked does not take it"):
                    await call.send(bytes(view[at : at + PIECE_BYTES]))
        return sent_bytes

    def _holders(self, question: _Question) -> list[tuple[Descriptor, PrefixHolder]]:
        """The capabilities that may hold it, those that say so first: what they say is a second old."""
        fitting = [
            (descriptor, holder)
            for descriptor, holder in self._host.holders()
            if descriptor.model is not None and descriptor.model.kv_key == question.kv_key
        ]
        fitting.sort(key=lambda pair: all(each.tag != question.tag for each in pair[1].warm()))
        return fitting[:HOLDERS_MAX]


@contextmanager
def _within(seconds: float, why: str) -> Generator[None, None, None]:
    """Raise Failed when it takes longer: what is held for it is let go."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Failed(f"{why}: {seconds:g} s", code="deadline_exceeded")


def _question(call: IncomingCall) -> tuple[_Question, Privacy]:
    try:
        if call.header.operation != EXPORT:
            raise Malformed(f"the operation: expected {EXPORT}")
        table = mapping(call.body, "question")
        tag = typed(table.get(TAG_FIELD), bytes, "tag")
        if len(tag) != TAG_BYTES:
            raise Malformed(f"tag: expected {TAG_BYTES} bytes")
        kv_key = typed(table.get(KEY_FIELD), str, "key")
        if not kv_key:
            raise Malformed("key: it is empty")
        question = _Question(tag, kv_key, count(table.get(MOST_FIELD), "most"))
        return question, Privacy(call.header.privacy)
    except ValueError as error:
        raise BadRequest(f"the call is malformed: {error}", code="malformed_call") from error


def _check_may_have(head: PrefixHead, question: _Question, caller: str, away: Privacy) -> None:
    """The last look before anything is sent, whatever the capability looked at itself."""
    if head.caller != caller:
        raise Refused("it is not this caller's", code="caller")
    if away is Privacy.LOCAL or head.privacy is Privacy.LOCAL:
        raise Refused("it may not leave this node", code="privacy")
    may_travel(head.privacy, away, at="the node that asks").enforce()
    if head.size_bytes > question.bytes_max:
        raise Refused(f"it has {head.size_bytes} bytes, more than wanted", code="too_large")


def _head_value(head: PrefixHead) -> Value:
    return {
        IDS_FIELD: head.token_ids,
        SIZE_FIELD: head.size_bytes,
        DIGEST_FIELD: head.digest,
        CLASS_FIELD: int(head.privacy),
    }
