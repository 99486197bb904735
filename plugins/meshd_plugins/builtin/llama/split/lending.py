"""`computation.gpt/memory`: this node's memory and arithmetic, lent to a model of another node.

One peer at a time opens a tunnel to it. For each tunnel a process of its own is started, and ended with it: it
holds the layers that are sent to it and computes them, for nobody else. The tunnel carries the bytes of ggml's
RPC; this plugin looks at none of them. What a client does to that process stays in its sandbox (decision 0030).
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Final

import trio

from meshd_plugins.api import (
    BadRequest,
    CapabilityError,
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    Operation,
    PluginContext,
    Privacy,
    Refused,
    Request,
    Value,
    Worker,
    WorkerSpec,
)
from meshd_plugins.builtin.llama.running.fit import MIB
from meshd_plugins.builtin.llama.running.hardware import Machine
from meshd_plugins.builtin.llama.running.launch import RPC_BUILD_CHARS_MAX, SLEEPING_ENVIRONMENT
from meshd_plugins.builtin.llama.split.config import RpcConfig
from meshd_plugins.builtin.llama.split.connections import Control, read, write
from meshd_plugins.builtin.llama.worker.rpc import RpcArguments

NAME: Final = "computation.gpt/memory"
START_DEADLINE_S: Final = 30.0
CLOSE_S: Final = 2.0
PROCESS_BYTES: Final = 256 * MIB  # of libraries, threads and what is not yet in its place
STAGING_SHARE: Final = 4  # a tensor is received whole before it is put where it belongs
TEXT_LENGTH_MAX: Final = RPC_BUILD_CHARS_MAX  # of what the process says


class Lending:
    """Implements `meshd_plugins.api.Capability`; `run` is its task."""

    def __init__(
        self,
        context: PluginContext,
        config: RpcConfig,
        available_bytes: Callable[[], int] = lambda: Machine().memory().available,
    ) -> None:
        self._context = context
        self._config = config
        self._available_bytes = available_bytes
        self._nursery: trio.Nursery | None = None
        self._descriptor: Descriptor | None = None

    @property
    def descriptor(self) -> Descriptor:
        """What is announced."""
        assert self._descriptor is not None, "it is announced by `run`"
        return self._descriptor

    async def run(self) -> None:
        """Look what there is, and lend it until cancelled; return at once where nothing can be lent."""
        log = self._context.log
        try:
            async with self._context.supervisor.worker(self._spec(-1)) as worker:
                hello = worker.hello
            if "refused" in hello:
                raise Failed(str(hello["refused"])[:500])
            self._descriptor = self._describe(hello)
        except (CapabilityError, ValueError) as error:
            log.error("llama.memory_not_lent", reason=str(error))
            return
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            capabilities = self._context.capabilities
            capabilities.add(self)
            log.info("llama.memory_lent", offer_mib=self._config.offer_mib)
            try:
                await trio.sleep_forever()
            finally:
                capabilities.remove(self.descriptor.id)

    async def invoke(self, request: Request) -> AsyncGenerator[Event, None]:
        """Carry one tunnel; see `meshd_plugins.api` for the contract."""
        if request.incoming is None or self._nursery is None:
            raise BadRequest("memory is lent to nodes of the mesh, by a tunnel")
        available = self._available_bytes()
        if available < self._config.offer_bytes:
            free, offered = available // MIB, self._config.offer_mib
            raise Refused(f"{offered} MiB are offered, and {free} are free now", code="busy")
        control = Control()
        session = _Session(self._context, self._spec(control.theirs), control, request.incoming)
        self._nursery.start_soon(session.run)
        try:
            while data := await session.receive():
                yield Chunk(data=data)
        finally:
            session.cancel()
            with trio.move_on_after(CLOSE_S, shield=True):
                await session.ended.wait()
        if session.error is not None:
            raise session.error
        yield Done()

    def _spec(self, control: int) -> WorkerSpec:
        """How the process is started; without a control socket it only says what there is."""
        config = self._config
        arguments = RpcArguments(control, config.threads, config.gpu)
        share = config.offer_bytes + config.offer_bytes // STAGING_SHARE
        return WorkerSpec(
            name="llama:memory",
            argv=(
                sys.executable,
                "-P",
                "-m",
                "meshd_plugins.builtin.llama.worker.rpc",
                arguments.to_text(),
            ),
            environment=SLEEPING_ENVIRONMENT,
            memory_bytes_max=share + PROCESS_BYTES,
            start_deadline_s=START_DEADLINE_S,
            gpu=config.gpu,
            sockets=(control,) if control >= 0 else (),
            private_loopback=True,
            shared_loopback=config.allow_loopback,
            hang_s=config.silence_s,
        )

    def _describe(self, hello: Mapping[str, Value]) -> Descriptor:
        """Raises ValueError: the worker said nonsense."""
        build, device, speed = (hello.get(n) for n in ("build", "device", "copies_gb_per_s"))
        if not isinstance(build, str) or not isinstance(device, str):
            raise ValueError("the worker does not say what it is")
        if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 <= speed < 1e6:
            raise ValueError("the worker does not say how fast it is")
        kind = "gpu" if self._config.gpu else "cpu"
        words = "".join(c for c in device[:TEXT_LENGTH_MAX] if c.isprintable())
        return Descriptor(
            name=NAME,
            operations=(Operation.TUNNEL,),
            summary=f"{self._config.offer_mib} MiB of {words or kind}, for layers of a model of another node",
            slots=1,
            privacy=Privacy[self._config.privacy.upper()],
            fields={
                "memory_mib": self._config.offer_mib,
                "device": kind,
                "build": build[:TEXT_LENGTH_MAX],
                "copies_gb_per_s": float(speed),
            },
        )


class _Session:
    """One tunnel with its process."""

    def __init__(
        self,
        context: PluginContext,
        spec: WorkerSpec,
        control: Control,
        incoming: Callable[[], Awaitable[bytes]],
    ) -> None:
        self._context = context
        self._spec = spec
        self._control = control
        self._incoming = incoming
        self._scope = trio.CancelScope()
        self._send, self._out = trio.open_memory_channel[bytes](1)
        self.ended = trio.Event()
        self.error: CapabilityError | None = None  # once it has ended by itself

    async def receive(self) -> bytes:
        """What goes to the peer next; none at the end."""
        try:
            return await self._out.receive()
        except trio.EndOfChannel:
            return b""

    def cancel(self) -> None:
        """The peer is gone."""
        self._scope.cancel()

    async def run(self) -> None:
        """Body of its task. Raises nothing."""
        try:
            with self._scope:
                await self._serve()
        except CapabilityError as error:
            self.error = error
        finally:
            self._control.close()
            self._send.close()
            self.ended.set()

    async def _serve(self) -> None:
        async with self._context.supervisor.worker(self._spec) as worker:
            if "refused" in worker.hello:
                raise Failed(str(worker.hello["refused"])[:500])
            connection = await self._control.receive()
            # While a call is open, a process that falls silent is ended.
            async with connection, worker.call({"operation": "session"}):
                why = await self._carry(connection, worker)
        raise Failed(why, code="worker_died")

    async def _carry(self, connection: trio.SocketStream, worker: Worker) -> str:
        """Both ways until one end is gone; why it is."""
        reasons: list[str] = []

        async def forth() -> None:
            try:
                while await write(connection, await self._incoming()):
                    pass
            except CapabilityError as error:
                reasons.append(error.message)
                nursery.cancel_scope.cancel()

        async def back() -> None:
            while data := await read(connection):
                await self._send.send(data)
            await trio.sleep(
                CLOSE_S
            )  # mostly the process has died, and `watch` is told why meanwhile
            reasons.append("the process closed the connection")
            nursery.cancel_scope.cancel()

        async def watch() -> None:
            reasons.append(await worker.wait_died())
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(forth)
            nursery.start_soon(back)
            nursery.start_soon(watch)
        return reasons[0] if reasons else "it ended"
