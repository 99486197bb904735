"""The capabilities of this node: registered by plugins, guarded by admission, invoked under a deadline.

Whoever asks, over HTTP on this node or over a stream from a peer, comes through `CapabilityHost.invoke`,
so slots, queue bounds, draining and the contract of `meshd_plugins.api` hold for both alike.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from traceback import extract_tb
from typing import assert_never, cast

import trio

from meshd.core import admission as doors
from meshd.core.admission import Admission, AdmissionConfig, Admitted, Queued, Ticket
from meshd.core.prefixes import TAG_BYTES, WARM_MAX
from meshd.orchestrate.access_guard import Guard, Source
from meshd.orchestrate.modalities import UNSUPPORTED_MODALITY, lacking, words
from meshd.orchestrate.records import check_fits
from meshd_naming import parse_capability_name
from meshd_plugins.api import (
    Capability,
    CapabilityError,
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    Logger,
    Operation,
    PrefixHolder,
    Privacy,
    Refused,
    Request,
    WarmPrefix,
)

Emit = Callable[[Chunk], Awaitable[None]]
Warmer = Callable[[Capability, Descriptor, Request, Source], Awaitable[None]]
CLOSE_DEADLINE_S = 2.0  # for a capability to clean up when its request is cancelled
HOSTED_MAX = 200  # capabilities; with their models and some tombstones they fit into one record


@dataclass(frozen=True, slots=True)
class HostChange:
    """A capability came, changed, or (`descriptor` None) went."""

    capability_id: str
    descriptor: Descriptor | None


@dataclass(frozen=True, slots=True)
class Departure:
    """A request that a capability of the cloud took out of the mesh."""

    capability_id: str
    request: Request
    source: Source
    outcome: str  # "ok" or a code


@dataclass(slots=True)
class _Turn:
    """A ticket that waits."""

    come: trio.Event = field(default_factory=trio.Event)  # with a slot, or without one
    gave_way: bool = False


@dataclass(slots=True)
class _Hosted:
    """One registered capability with its door."""

    capability: Capability
    descriptor: Descriptor  # as it was registered: a property may say something else tomorrow
    door: Admission


class CapabilityHost:
    """Implements `meshd_plugins.api.Capabilities` for the plugins and runs what they registered.

    Args:
        queue_max: requests that may wait for a slot of one capability.
        changed: told of every change, in the order in which they happen.
        load_changed: told when a request comes or goes.
        guard: lets requests in, or not.
        departed: told of requests that a capability took out of the mesh, with how they ended.
        warmer: runs before a request that has its slot, to fetch what is warm elsewhere; raises nothing.
        log: bound logger.
    """

    def __init__(
        self,
        *,
        guard: Guard,
        queue_max: int,
        changed: Callable[[HostChange], None],
        load_changed: Callable[[], None],
        log: Logger,
        departed: Callable[[Departure], None] = lambda _departure: None,
        warmer: Warmer | None = None,
    ) -> None:
        self._warmer = warmer
        self._guard = guard
        self._departed = departed
        self._queue_max = queue_max
        self._hosted: dict[str, _Hosted] = {}
        self._changed = changed
        self._load_changed = load_changed
        self._log = log
        self._waiting: dict[Ticket, _Turn] = {}
        self._draining = False
        self._in_flight = 0
        self._tunnels: dict[int, trio.CancelScope] = {}
        self._idle = trio.Event()
        self._idle.set()

    # -- registration (meshd_plugins.api.Capabilities) ------------------------------------------------

    def add(self, capability: Capability) -> None:
        """Announce it.

        Raises:
            ValueError: the name is malformed, the id is taken on this node, the descriptor is too large
                for the store, or there are `HOSTED_MAX` already. Nothing was changed.
        """
        descriptor = _checked(capability.descriptor)
        if descriptor.id in self._hosted:
            raise ValueError(f"{descriptor.id} is registered on this node already")
        if len(self._hosted) >= HOSTED_MAX:
            raise ValueError(f"{descriptor.id} is one too many: a node announces {HOSTED_MAX}")
        self._hosted[descriptor.id] = _Hosted(capability, descriptor, self._door(descriptor))
        self._changed(HostChange(descriptor.id, descriptor))

    def replace(self, capability: Capability) -> None:
        """Announce a new descriptor under the same id.

        What runs keeps its slot; a changed number of slots counts from the next request on.

        Raises:
            KeyError: the id is not there.
            ValueError: as `add`. Nothing was changed.
        """
        descriptor = _checked(capability.descriptor)
        hosted = self._hosted[descriptor.id]
        if hosted.door.config.slots != descriptor.slots:
            hosted.door.config = AdmissionConfig(descriptor.slots, self._queue_max)
        hosted.capability, hosted.descriptor = capability, descriptor
        self._changed(HostChange(descriptor.id, descriptor))

    def remove(self, capability_id: str) -> None:
        """Withdraw it; requests in flight go on. Raises KeyError if the id is not there."""
        hosted = self._hosted.pop(capability_id)
        self._turn_away(hosted.door)
        self._changed(HostChange(capability_id, None))

    def _turn_away(self, door: Admission) -> None:
        for ticket in door.drain():
            self._waiting[ticket].come.set()

    def _door(self, descriptor: Descriptor) -> Admission:
        door = Admission(AdmissionConfig(descriptor.slots, self._queue_max))
        if self._draining:
            door.drain()
        return door

    # -- reading ---------------------------------------------------------------------------------------

    def descriptors(self) -> tuple[Descriptor, ...]:
        """What is registered now, sorted by id."""
        return tuple(self._hosted[key].descriptor for key in sorted(self._hosted))

    def descriptor(self, capability_id: str) -> Descriptor | None:
        """What is registered under an id."""
        hosted = self._hosted.get(capability_id)
        return hosted.descriptor if hosted is not None else None

    def busy(self) -> dict[str, tuple[int, int]]:
        """Requests that run and that wait, by capability id."""
        loads = {key: hosted.door.load() for key, hosted in self._hosted.items()}
        return {key: (load["busy"], load["queued"]) for key, load in loads.items()}

    def held_s(self) -> dict[str, float]:
        """Seconds that a request is expected to hold a slot, by capability id; 0.0: not known."""
        now_s = trio.current_time()
        return {key: hosted.door.held_s(now_s) for key, hosted in self._hosted.items()}

    def holders(self) -> tuple[tuple[Descriptor, PrefixHolder], ...]:
        """The capabilities that keep KV state which other nodes may take over."""
        return tuple(
            (hosted.descriptor, hosted.capability)
            for hosted in self._hosted.values()
            if isinstance(hosted.capability, PrefixHolder) and hosted.descriptor.model is not None
        )

    def warm(self) -> tuple[tuple[bytes, int], ...] | None:
        """Tags and tokens of what is warm here, at most `WARM_MAX`; None when nothing here keeps any.

        The most recently used of each model first; names of one model share what they keep.
        """
        holders = self.holders()
        if not holders:
            return None
        lists: list[Sequence[WarmPrefix]] = []
        for descriptor, holder in holders:
            try:
                with _Boundary(descriptor.id, self._log):
                    lists.append([each for each in holder.warm()[:WARM_MAX] if _is_whole(each)])
            except CapabilityError:
                continue  # the boundary has logged it
        found: dict[bytes, int] = {}
        for row in zip_longest(*lists):
            for prefix in row:
                if prefix is not None and len(found) < WARM_MAX:
                    found.setdefault(prefix.tag, prefix.tokens)
        return tuple(found.items())

    @property
    def queue_max(self) -> int:
        """How many requests may wait for one capability."""
        return self._queue_max

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining

    @property
    def in_flight(self) -> int:
        """Requests that run or wait now."""
        return self._in_flight

    # -- doing the work --------------------------------------------------------------------------------

    async def invoke(
        self, capability_id: str, request: Request, emit: Emit, source: Source
    ) -> Done:
        """Run one request here, chunks going to `emit` as they come.

        The slot is given back whatever happens. Cancellation reaches the capability at once.

        Raises:
            Refused: `not_here`, `unsupported`, `unsupported_modality`, `draining` or `busy`; or as the guard says: `privacy`,
                `access`, `caller`, `observer`; nothing was done.
            BadRequest: as the capability says.
            Failed: as the capability says; or `contract` if it broke the contract of
                `meshd_plugins.api`; or `deadline_exceeded`.
        """
        hosted = self._hosted.get(capability_id)
        if hosted is None:
            raise Refused(f"{capability_id} is not on this node", code="not_here")
        if request.operation not in hosted.descriptor.operations:
            raise Refused(f"{capability_id} does not {request.operation}", code="unsupported")
        if short := lacking(hosted.descriptor, request.body):
            told = f"{capability_id} does not take in {words(short)}"
            raise Refused(told, code=UNSUPPORTED_MODALITY)
        self._guard.admit(hosted.descriptor, request.name, request.privacy, source)
        if hosted.descriptor.privacy is Privacy.CLOUD:
            return await self._outside(hosted, request, emit, source)
        if request.operation is Operation.TUNNEL:
            return await self._tunnelled(hosted, request, emit, source)
        return await self._timed(hosted, request, emit, source)

    async def _tunnelled(
        self, hosted: _Hosted, request: Request, emit: Emit, source: Source
    ) -> Done:
        """Run a tunnel, which nothing ends by itself: draining does."""
        scope = trio.CancelScope()
        self._tunnels[id(scope)] = scope
        try:
            with scope:
                return await self._timed(hosted, request, emit, source)
        finally:
            del self._tunnels[id(scope)]
        raise Failed("this node is going down", code="draining")

    async def _outside(self, hosted: _Hosted, request: Request, emit: Emit, source: Source) -> Done:
        """Run a request that leaves the mesh, and tell of it however it ends."""
        outcome = "cancelled"
        try:
            done = await self._timed(hosted, request, emit, source)
            outcome = "ok"
            return done
        except CapabilityError as error:
            outcome = error.code
            raise
        finally:
            self._departed(Departure(hosted.descriptor.id, request, source, outcome))

    async def _timed(self, hosted: _Hosted, request: Request, emit: Emit, source: Source) -> Done:
        self._in_flight += 1
        if self._in_flight == 1:
            self._idle = trio.Event()
        self._load_changed()
        try:
            with trio.move_on_after(request.deadline_s):
                return await self._admitted(hosted, request, emit, source)
            raise Failed(
                f"{hosted.descriptor.id} did not finish within {request.deadline_s:.1f} s",
                code="deadline_exceeded",
            )
        finally:
            self._in_flight -= 1
            self._load_changed()
            if self._in_flight == 0:
                self._idle.set()

    def close_to_peers(self) -> None:
        """Say that we drain. Asks that this node has taken already still find their slots here."""
        self._draining = True
        for scope in self._tunnels.values():
            scope.cancel()
        self._load_changed()

    async def drain(self) -> None:
        """Take nothing new; return when what runs has ended. The caller bounds the wait."""
        self.close_to_peers()
        for hosted in self._hosted.values():
            self._turn_away(hosted.door)
        await self._idle.wait()

    async def _admitted(
        self, hosted: _Hosted, request: Request, emit: Emit, source: Source
    ) -> Done:
        now_s = trio.current_time()
        ticket = Ticket(request.request_id, request.caller, now_s + request.deadline_s)
        verdict = hosted.door.request(ticket, now_s)
        match verdict:
            case Admitted():
                pass
            case Queued(gave_way=other):
                if other is not None:
                    turn = self._waiting[other]
                    turn.gave_way = True
                    turn.come.set()
                await self._wait_for_slot(hosted, ticket)
            case doors.Refused():
                raise Refused(f"{hosted.descriptor.id}: {verdict.message}", code=verdict.code)
            case _:
                assert_never(verdict)
        try:
            if self._warmer is not None and source.hint is not None:
                await self._warmer(hosted.capability, hosted.descriptor, request, source)
            return await self._run(hosted, request, emit)
        finally:
            self._release(hosted.door, ticket)

    async def _wait_for_slot(self, hosted: _Hosted, ticket: Ticket) -> None:
        """Return with a slot, or raise without one."""
        door = hosted.door
        turn = self._waiting[ticket] = _Turn()
        try:
            await turn.come.wait()
        except trio.Cancelled:
            if door.holds(ticket):  # admitted and cancelled in the same moment
                self._release(door, ticket)
            else:
                door.cancel(ticket)
            raise
        finally:
            del self._waiting[ticket]
        if turn.gave_way:
            raise Refused(f"{hosted.descriptor.id}: it gave way to others' requests", code="busy")
        if not door.holds(ticket):
            code = "draining" if self._draining else "not_here"
            raise Refused(f"{hosted.descriptor.id} takes no new work", code=code)

    def _release(self, door: Admission, ticket: Ticket) -> None:
        for admitted in door.release(ticket, trio.current_time()):
            self._waiting[admitted].come.set()

    async def _run(self, hosted: _Hosted, request: Request, emit: Emit) -> Done:
        """Pull the events of one invocation; what `emit` raises is not the capability's fault."""
        name = hosted.descriptor.id
        events: AsyncGenerator[Event, None] | None = None
        done: Done | None = None
        try:
            with _Boundary(name, self._log):
                events = hosted.capability.invoke(request)
            while True:
                with _Boundary(name, self._log):
                    event = await anext(events, None)
                match event:
                    case None:
                        break
                    case Chunk() if done is None:
                        await emit(event)
                    case Done() if done is None:
                        done = event
                    case Chunk() | Done():
                        raise Failed(f"{name} went on after its end", code="contract")
                    case _:  # plugins need not be type-checked
                        raise Failed(f"{name} yielded what is no event", code="contract")
        finally:
            if events is not None:
                with trio.move_on_after(CLOSE_DEADLINE_S, shield=True), _Boundary(name, self._log):
                    await events.aclose()
        if done is None:
            raise Failed(f"{name} stopped without saying that it was done", code="contract")
        return done


class _Boundary:
    """Where a plugin's code runs: what it raises beside the errors of the contract becomes `Failed`.

    The log says what was raised and where, and not with which words: those may quote the prompt.
    """

    def __init__(self, name: str, log: Logger) -> None:
        self._name = name
        self._log = log

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, BaseExceptionGroup):
            self._split(cast("BaseExceptionGroup[BaseException]", error))
        if isinstance(error, Exception) and not isinstance(error, CapabilityError):
            raise self._crashed(error) from error

    def _split(self, group: BaseExceptionGroup[BaseException]) -> None:
        """A nursery of the plugin: a cancellation in it must reach the scope that caused it."""
        broken, stopped = group.split(Exception)
        if stopped is not None:
            if broken is not None:
                self._crashed(broken)
            raise stopped
        if len(group.exceptions) == 1 and isinstance(group.exceptions[0], CapabilityError):
            raise group.exceptions[0]

    def _crashed(self, error: BaseException) -> Failed:
        kind = type(error).__qualname__
        frames = extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        self._log.error("capability.crashed", capability=self._name, error=kind, where=where)
        return Failed(f"{self._name} crashed: {kind}", code="crashed")


def _is_whole(prefix: WarmPrefix) -> bool:
    """Plugins need not be type-checked; what is no tag at all raises, within their boundary."""
    return type(prefix.tag) is bytes and len(prefix.tag) == TAG_BYTES and prefix.tokens > 0


def _checked(descriptor: Descriptor) -> Descriptor:
    parse_capability_name(descriptor.name)
    if descriptor.slots < 1:
        raise ValueError(f"{descriptor.id}: slots must be at least 1, not {descriptor.slots}")
    if not descriptor.operations:
        raise ValueError(f"{descriptor.id}: it must have an operation")
    check_fits(descriptor)
    return descriptor
