"""For authors of plugins: the contract of a capability as a check, and fakes to run a plugin in.

`fake_context` makes the context to call a plugin's hooks with, and `check_capability` drives what it
registered; docs/plugins.md has a complete test.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import trio

from meshd_plugins.api import (
    BadRequest,
    Capability,
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    NoPeers,
    Operation,
    Peers,
    PluginContext,
    Privacy,
    Refused,
    Request,
    Supervisor,
    Value,
    Worker,
    WorkerCall,
    WorkerSpec,
)

CANCEL_S: Final = 5.0
"""A cancelled `invoke` must have ended within this."""

_NAME: Final = re.compile(r"(knowledge|data|computation)\.gpt(/[a-z0-9][a-z0-9_.-]*)+")


class ContractBroken(AssertionError):
    """A capability does what it must not; the message says what and which rule that is."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a capability yielded while it was checked."""

    chunks: tuple[Chunk, ...]
    done: Done

    @property
    def text(self) -> str:
        """All text, joined."""
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def data(self) -> bytes:
        """All data, joined."""
        return b"".join(chunk.data for chunk in self.chunks)


async def check_capability(
    capability: Capability, request: Request, *, cancel: bool = True
) -> Checked:
    """Drive a capability and check its descriptor, its events and, unless told not to, cancellation.

    `cancel=True` invokes it three times: to the end, cancelled before its first event, and cancelled
    after it.

    Raises:
        ContractBroken: a rule of `meshd_plugins.api` is broken.
        BadRequest, Refused, Failed: raised by the capability where the contract allows it.
    """
    check_descriptor(capability.descriptor)
    if request.operation not in capability.descriptor.operations:
        raise ContractBroken(
            f"{capability.descriptor.id} does not announce {request.operation}: announce it or ask another"
        )
    checked = await _drive(capability, request)
    if cancel:
        await _cancelled(capability, request, after_events=0)
        await _cancelled(capability, request, after_events=1)
    return checked


def check_descriptor(descriptor: Descriptor) -> None:
    """Check what is announced. Raises ContractBroken."""
    if not _NAME.fullmatch(descriptor.name):
        raise ContractBroken(
            f"the name {descriptor.name!r} is not of the form knowledge.gpt/…, data.gpt/… or computation.gpt/…"
        )
    if descriptor.slots < 1:
        raise ContractBroken(f"{descriptor.id} has {descriptor.slots} slots; at least 1 is needed")
    if not descriptor.operations:
        raise ContractBroken(f"{descriptor.id} announces no operation")
    if not descriptor.summary or "\n" in descriptor.summary:
        raise ContractBroken(f"{descriptor.id} needs a summary of one line")


def _stream(capability: Capability, request: Request) -> AsyncGenerator[Event, None]:
    stream = capability.invoke(request)
    if not hasattr(stream, "__aiter__") or not hasattr(stream, "aclose"):  # an untyped author's
        raise ContractBroken(
            f"invoke returned {type(stream).__name__}: write it as `async def` with `yield`"
        )
    return stream


async def _drive(capability: Capability, request: Request) -> Checked:
    chunks: list[Chunk] = []
    done: Done | None = None
    stream = _stream(capability, request)
    try:
        async for event in stream:
            _check_event(event, done)
            if isinstance(event, Done):
                done = event
            else:
                chunks.append(event)
    except (BadRequest, Refused) as error:
        if chunks or done:
            raise ContractBroken(
                f"{type(error).__name__} after the first event: only Failed may be raised then"
            ) from error
        raise
    except (Failed, ContractBroken):
        raise
    except Exception as error:
        raise ContractBroken(
            f"invoke raised {type(error).__name__}: {error}; only BadRequest, Refused and Failed are allowed"
        ) from error
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(CANCEL_S):
            await stream.aclose()
    if done is None:
        raise ContractBroken("the stream ended without Done: that is reported as a failure")
    return Checked(tuple(chunks), done)


def _check_event(event: object, done: Done | None) -> None:
    if done is not None:
        raise ContractBroken(
            f"{type(event).__name__} came after Done, which must be the last event"
        )
    if not isinstance(event, Chunk | Done):
        raise ContractBroken(
            f"invoke yielded {type(event).__name__}: only Chunk and Done are events"
        )


async def _cancelled(capability: Capability, request: Request, *, after_events: int) -> None:
    """Cancel an invocation and see that it ends, quietly."""
    where = "before the first event" if after_events == 0 else "after the first event"
    cancelled_s = trio.current_time()
    with trio.CancelScope() as scope:
        stream = _stream(capability, request)
        try:
            if after_events == 0:
                scope.cancel()
            async for _ in stream:
                if not scope.cancel_called:
                    cancelled_s = trio.current_time()
                    scope.cancel()
        except (BadRequest, Refused, Failed) as error:
            raise ContractBroken(
                f"cancelled {where}, it raised {type(error).__name__}: let trio.Cancelled pass"
            ) from error
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(CANCEL_S):
                await stream.aclose()
    took_s = trio.current_time() - cancelled_s
    if took_s > CANCEL_S:
        raise ContractBroken(f"cancelled {where}, it went on for {took_s:.1f} s")


class FakeCapabilities:
    """A registry that checks what the daemon's checks; `added` is what is announced now, in order."""

    def __init__(self) -> None:
        self._by_id: dict[str, Capability] = {}
        self.replaced: list[str] = []  # ids, in the order of `replace` calls

    @property
    def added(self) -> tuple[Capability, ...]:
        """What is announced now."""
        return tuple(self._by_id.values())

    def add(self, capability: Capability) -> None:
        """Announce it. Raises ValueError for a malformed descriptor or a taken id."""
        try:
            check_descriptor(capability.descriptor)
        except ContractBroken as error:
            raise ValueError(str(error)) from error
        if capability.descriptor.id in self._by_id:
            raise ValueError(f"{capability.descriptor.id} is already registered")
        self._by_id[capability.descriptor.id] = capability

    def replace(self, capability: Capability) -> None:
        """Announce a new descriptor. Raises KeyError."""
        if capability.descriptor.id not in self._by_id:
            raise KeyError(capability.descriptor.id)
        self._by_id[capability.descriptor.id] = capability
        self.replaced.append(capability.descriptor.id)

    def remove(self, capability_id: str) -> None:
        """Withdraw it. Raises KeyError."""
        del self._by_id[capability_id]


@dataclass(slots=True)
class FakeLogger:
    """Keeps what was logged: (level, event, fields)."""

    records: list[tuple[str, str, dict[str, object]]] = field(
        default_factory=list[tuple[str, str, dict[str, object]]]
    )

    def debug(self, event: str, **fields: object) -> None:
        """Keep a line."""
        self.records.append(("debug", event, fields))

    def info(self, event: str, **fields: object) -> None:
        """Keep a line."""
        self.records.append(("info", event, fields))

    def warning(self, event: str, **fields: object) -> None:
        """Keep a line."""
        self.records.append(("warning", event, fields))

    def error(self, event: str, **fields: object) -> None:
        """Keep a line."""
        self.records.append(("error", event, fields))

    def events(self, level: str) -> list[str]:
        """Names of the events of one level, in order."""
        return [event for found, event, _ in self.records if found == level]


class Script(Protocol):
    """What a fake worker answers: the messages of one call."""

    def __call__(self, message: Mapping[str, Value], /) -> Sequence[Mapping[str, Value]]:
        """Return all replies to a message."""
        ...


class _FakeCall:
    def __init__(self, replies: Sequence[Mapping[str, Value]]) -> None:
        self._replies = iter(replies)

    async def receive(self) -> Mapping[str, Value] | None:
        await trio.lowlevel.checkpoint()
        return next(self._replies, None)


class FakeWorker:
    """A worker that answers from a script; `die` ends it.

    Attributes:
        open_calls: operations of the calls that nobody has left yet.
    """

    def __init__(self, spec: WorkerSpec, script: Script, hello: Mapping[str, Value]) -> None:
        self.spec = spec
        self._script = script
        self._hello = hello
        self._died = trio.Event()
        self._why = ""
        self.open_calls: list[str] = []

    @property
    def hello(self) -> Mapping[str, Value]:
        """What the process said when it was ready."""
        return self._hello

    @asynccontextmanager
    async def _call(self, message: Mapping[str, Value]) -> AsyncGenerator[WorkerCall, None]:
        await trio.lowlevel.checkpoint()
        if self._died.is_set():
            raise Failed(self._why, code="worker_died")
        operation = str(message.get("operation"))
        call = _FakeCall(self._script(message))
        self.open_calls.append(operation)
        try:
            yield call
        finally:
            self.open_calls.remove(operation)

    def call(self, message: Mapping[str, Value]) -> AbstractAsyncContextManager[WorkerCall]:
        """Send a request."""
        return self._call(message)

    async def wait_died(self) -> str:
        """Return why, once `die` was called."""
        await self._died.wait()
        return self._why

    def die(self, why: str) -> None:
        """End it."""
        self._why = why
        self._died.set()


class FakeSupervisor:
    """Starts `FakeWorker`s; `started` are all of them, in order."""

    def __init__(self, script: Script, hello: Mapping[str, Value] | None = None) -> None:
        self._script = script
        self._hello = hello or {}
        self.started: list[FakeWorker] = []

    @asynccontextmanager
    async def _worker(self, spec: WorkerSpec) -> AsyncGenerator[Worker, None]:
        await trio.lowlevel.checkpoint()
        worker = FakeWorker(spec, self._script, self._hello)
        self.started.append(worker)
        yield worker

    def worker(self, spec: WorkerSpec) -> AbstractAsyncContextManager[Worker]:
        """Start one."""
        return self._worker(spec)


def _no_workers(message: Mapping[str, Value], /) -> Sequence[Mapping[str, Value]]:
    raise AssertionError(f"no script was given for the worker's {message!r}")


def fake_context(
    name: str,
    state_dir: Path,
    config: Mapping[str, Value] | None = None,
    *,
    capabilities: FakeCapabilities | None = None,
    supervisor: Supervisor | None = None,
    log: FakeLogger | None = None,
    clock: Callable[[], float] = time.monotonic,
    peers: Peers | None = None,
) -> PluginContext:
    """Make a context out of fakes; pass your own to look into them afterwards."""
    return PluginContext(
        name=name,
        config=config or {},
        state_dir=state_dir,
        capabilities=capabilities or FakeCapabilities(),
        supervisor=supervisor or FakeSupervisor(_no_workers),
        log=log or FakeLogger(),
        clock=clock,
        peers=peers or NoPeers(),
    )


def make_request(
    operation: Operation,
    body: Mapping[str, Value] | None = None,
    *,
    name: str = "",
    deadline_s: float = 60.0,
) -> Request:
    """Make a request as an entry node would."""
    return Request(
        request_id="00000000-test",
        name=name or "computation.gpt/test",
        operation=operation,
        body=body or {},
        privacy=Privacy.MESH,
        deadline_s=deadline_s,
    )
