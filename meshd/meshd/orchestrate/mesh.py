"""The mesh as one node's edges see it: implements `MeshService`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from meshd.core.membership import MemberView
from meshd.orchestrate.audit import Recorder, no_record
from meshd.orchestrate.callers import KEY_PREFIX
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.events import Answered, Ask, AskEvent, Piece, Routed
from meshd.orchestrate.executor import Executor
from meshd.orchestrate.metrics import Family
from meshd.orchestrate.planner import AUTO, plan
from meshd.orchestrate.records import load_for_people
from meshd.orchestrate.service import Take
from meshd_cms import NodeId, node_id_text
from meshd_naming import NamingError, ResolveOptions
from meshd_plugins.api import CapabilityError, Failed, Logger, Privacy, Refused, Value

ERROR_CHARS_MAX = 500  # of an error's message in the canonical line


class Looks(Protocol):
    """What an operator looks at; see `MeshService` for each."""

    def status(self) -> Mapping[str, Value]:
        """This node."""
        ...

    def metrics(self) -> Sequence[Family]:
        """Counters and gauges."""
        ...

    def store(self, node: str) -> Mapping[str, Value]:
        """The records held here."""
        ...

    async def store_diff(self, node: str) -> Mapping[str, Value]:
        """Our store beside a peer's."""
        ...

    async def doctor(self) -> Mapping[str, Value]:
        """What is wrong."""
        ...


@dataclass(frozen=True, slots=True)
class Faces:
    """What the service shows of parts that it does not own."""

    looks: Looks
    plugins: Callable[[], Sequence[Mapping[str, Value]]]
    config: Callable[[], Sequence[Mapping[str, Value]]]
    leave: Callable[[], Awaitable[None]]


class Mesh:
    """One node's view of the mesh, for its edges.

    Args:
        catalogue: what is known.
        executor: what runs plans.
        faces: what is shown of parts that are not the mesh's, from the composition root.
        requests_max: asks in flight here; further ones are refused.
        default_privacy: class of an ask that names none.
        record: notes what was answered to the holders of API keys, who are not of this machine.
        log: one canonical line is written for each ask.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        executor: Executor,
        faces: Faces,
        *,
        requests_max: int,
        log: Logger,
        default_privacy: Privacy = Privacy.MESH,
        record: Recorder = no_record,
    ) -> None:
        self._record = record
        self._default_privacy = default_privacy
        self._catalogue = catalogue
        self._executor = executor
        self._faces = faces
        self._requests_max = requests_max
        self._log = log
        self._draining = False
        self._asks = 0
        self._idle = trio.Event()

    async def ask(self, ask: Ask, take: Take) -> None:
        """Run one ask; see `MeshService.ask`."""
        line = _CanonicalLine(ask, trio.current_time(), take)
        self._asks += 1
        try:
            if self._draining:
                raise Refused("this node is stopping", code="draining")
            if self._asks > self._requests_max:
                raise Refused(f"{self._requests_max} requests are in flight here", code="busy")
            ask = self._classed(ask)
            # Looked up only where they are read: it takes a walk through the whole catalogue.
            data_names = self._catalogue.data_names() if ask.target == AUTO else ()
            planned = plan(ask, data_names)
            await self._executor.run(ask, planned, line.take)
            if line.answered is None:
                raise Failed("the plan ended without an answer", code="internal")
        except Exception as error:
            line.error = error
            raise
        finally:
            self._asks -= 1
            if self._asks == 0 and self._draining:
                self._idle.set()
            line.write(self._log)
            if ask.principal.startswith(KEY_PREFIX):
                line.note(self._record)

    def _classed(self, ask: Ask) -> Ask:
        """The ask with its class: the one it names, within what its principal may.

        Raises:
            Refused: `privacy`: it names a wider one.
        """
        most = ask.privacy_max
        if ask.privacy is None:
            return replace(ask, privacy=min(self._default_privacy, most))
        if ask.privacy > most:
            raise Refused(
                f"{ask.principal} may send requests no further than {most.name.lower()}, and this one is for"
                f" {ask.privacy.name.lower()}",
                code="privacy",
            )
        return ask

    def resolve(self, name: str) -> Mapping[str, Value]:
        """Resolution of a name, explained; see `MeshService.resolve`."""
        resolution = self._catalogue.resolve(name, ResolveOptions(explain=True))
        return resolution.to_value()

    def status(self) -> Mapping[str, Value]:
        """This node."""
        return self._faces.looks.status()

    def metrics(self) -> Sequence[Family]:
        """Counters and gauges of this node."""
        return self._faces.looks.metrics()

    def store(self, node: str) -> Mapping[str, Value]:
        """The records held here; see `MeshService.store`."""
        return self._faces.looks.store(node)

    async def store_diff(self, node: str) -> Mapping[str, Value]:
        """Our store beside a peer's; see `MeshService.store_diff`."""
        return await self._faces.looks.store_diff(node)

    async def doctor(self) -> Mapping[str, Value]:
        """What is wrong; see `MeshService.doctor`."""
        return await self._faces.looks.doctor()

    def peers(self) -> list[Mapping[str, Value]]:
        """Members, this node first, then by name."""
        serves: defaultdict[NodeId, list[str]] = defaultdict(list)
        for offer in self._catalogue.offers():
            serves[offer.owner].append(offer.name.path)
        rows = [self._peer(view, serves[view.node]) for view in self._catalogue.members()]
        return sorted(rows, key=lambda row: (not row["self"], str(row["name"]), str(row["node"])))

    def capabilities(self) -> list[Mapping[str, Value]]:
        """Every capability known in the mesh, by name, then by node."""
        rows: list[Mapping[str, Value]] = []
        for offer in self._catalogue.offers():
            load = self._catalogue.load_of((offer.owner, offer.capability_id))
            family, quant, context = (offer.fields.get(k) for k in ("family", "quant", "context"))
            rows.append(
                {
                    "name": offer.name.path,
                    "capability": offer.capability_id,
                    "node": node_id_text(offer.owner),
                    "node_name": offer.node_name,
                    "state": self._catalogue.state_of(offer.owner).name.lower(),
                    "operations": list(offer.operations),
                    "summary": self._catalogue.summary_of(offer),
                    "slots": offer.slots,
                    "busy": load.busy if load else None,
                    "queued": load.queued if load else None,
                    "model": family,
                    "quantisation": quant,
                    "context_tokens": context,
                    "modalities": list(offer.modalities) if family is not None else [],
                    "decode_tokens_per_s": offer.fields.get("decode_tokens_per_s"),
                    "prefill_tokens_per_s": offer.fields.get("prefill_tokens_per_s"),
                    "privacy": offer.privacy.name.lower(),
                    "age_s": round(self._catalogue.age_of(offer.owner), 1),
                }
            )
        return sorted(rows, key=lambda row: (str(row["name"]), str(row["node_name"])))

    def plugins(self) -> list[Mapping[str, Value]]:
        """Plugins of this node."""
        return list(self._faces.plugins())

    def config(self) -> list[Mapping[str, Value]]:
        """Configuration in force."""
        return list(self._faces.config())

    async def leave(self) -> None:
        """Announce a graceful leave and stop the daemon."""
        await self._faces.leave()

    async def drain(self) -> None:
        """Refuse new asks from now on; return when those that run have ended. The caller bounds it."""
        self._draining = True
        if self._asks:
            await self._idle.wait()

    @property
    def asks_in_flight(self) -> int:
        """Asks that run now."""
        return self._asks

    def _peer(self, view: MemberView, serves: list[str]) -> Mapping[str, Value]:
        shown = self._catalogue.load_shown(view.node)
        load_age_s = self._catalogue.load_age_of(view.node)
        now_s = trio.current_time()
        return {
            "node": node_id_text(view.node),
            "name": view.name,
            "address": f"{view.address[0]}:{view.address[1]}",
            "state": view.state.value,
            "self": view.is_self,
            "since_s": round(max(0.0, now_s - view.since_s), 1),
            "epoch": int(view.epoch),
            "incarnation": view.incarnation,
            "heard_age_s": None
            if view.heard_s is None
            else round(max(0.0, now_s - view.heard_s), 1),
            "round_trip_ms": None
            if view.round_trip_s is None
            else round(view.round_trip_s * 1e3, 2),
            "load_age_s": None if load_age_s is None else round(load_age_s, 1),
            "load": {} if shown is None else load_for_people(shown[0]),
            "capabilities": len(serves),
            "serves": sorted(set(serves)),
        }


class _CanonicalLine:
    """What the one log line of an ask says: who did what, how long, how it ended. No content."""

    def __init__(self, ask: Ask, began_s: float, take: Take) -> None:
        self._take = take
        self._ask = ask
        self._began_s = began_s
        self._peers: list[str] = []
        self._first_s: float | None = None
        self._pieces = self._bytes = 0
        self.answered: Answered | None = None  # as its reader saw it
        self.error: Exception | None = None
        self.reader_broke = False  # the error came from whoever read the events

    async def take(self, event: AskEvent) -> None:
        """Note what the line will say, and pass the event on."""
        match event:
            case Routed():
                self._peers.append(f"{event.capability_id}@{event.node_name}")
            case Piece():
                if self._first_s is None:
                    self._first_s = trio.current_time() - self._began_s
                self._pieces += 1
                self._bytes += len(event.text) + len(event.data) + len(event.reasoning)
                self._bytes += sum(len(call.arguments) for call in event.tool_calls)
            case Answered():
                self.answered = event
            case _:
                pass
        try:
            await self._take(event)
        except Exception:
            self.reader_broke = True
            raise

    def write(self, log: Logger) -> None:
        """Write it."""
        fields: dict[str, object] = {
            "request_id": self._ask.request_id,
            "target": self._ask.target,
            "operation": str(self._ask.operation),
            "peers": self._peers,
            "total_ms": round((trio.current_time() - self._began_s) * 1e3, 1),
        }
        if self._first_s is not None:
            fields["first_ms"] = round(self._first_s * 1e3, 1)
        if self.answered is not None:
            usage = self.answered.usage
            fields["finish_reason"] = self.answered.finish_reason
            fields["prompt_tokens"] = usage.prompt_tokens
            fields["completion_tokens"] = usage.completion_tokens
        elif isinstance(self.error, Refused | Failed):
            fields["error"] = self.error.message[:ERROR_CHARS_MAX]
        log.info("ask.finished", outcome=self._outcome(), **fields)

    def note(self, record: Recorder) -> None:
        """Note that this was answered to somebody beyond this machine."""
        privacy = self._ask.privacy
        record(
            "answered",
            to=self._ask.principal,
            to_name=self._ask.principal,
            capability=self._ask.target,
            privacy="default" if privacy is None else privacy.name.lower(),
            request=self._ask.request_id,
            bytes=self._bytes,
            pieces=self._pieces,
            outcome=self._outcome(),
        )

    def _outcome(self) -> str:
        if self.answered is not None:
            return "ok"
        return "cancelled" if self.error is None else self._code(self.error)

    def _code(self, error: Exception) -> str:
        """A stable code. The message of a bad request or name may quote the prompt: it is not logged."""
        if isinstance(error, CapabilityError | NamingError):
            return error.code
        return "cancelled" if self.reader_broke else "internal"
