"""One model: found, measured, loaded when it is wanted, watched, and unloaded again.

A model is *starting* (its file is verified, its header read), *cold* (announced, not in memory), *loading*,
*serving*, *backing off* (its worker died) or *quarantined*. It is announced while it is cold, loading or
serving, once it was loaded on this device for the first time: what is announced is measured. A request for
one that is not in memory has it loaded; all requests that come meanwhile wait for that one load. One whose
worker died is withdrawn until it may start again; one that crashes again and again, does not fit this
machine, or has a broken file is quarantined, with the reason: for a while that grows, or until its file
changes or somebody asks for another try.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Final

import trio

from meshd_plugins.api import (
    CapabilityError,
    Failed,
    PluginConfigError,
    Refused,
    Value,
    Worker,
)
from meshd_plugins.builtin.llama.config import ModelConfig
from meshd_plugins.builtin.llama.models.digest import ModelRefused
from meshd_plugins.builtin.llama.running.benching import KEPT, TABLES, bench
from meshd_plugins.builtin.llama.running.door import Door
from meshd_plugins.builtin.llama.running.fit import DoesNotFit, Plan, Room, choose
from meshd_plugins.builtin.llama.running.keeping import State, Tools
from meshd_plugins.builtin.llama.running.launch import (
    Inspected,
    check_refusal,
    files_seen,
    inspect,
    open_files,
    worker_spec,
)
from meshd_plugins.builtin.llama.running.preparing import (
    Prepared,
    capped,
    find_room,
    key_of,
    wish_of,
)
from meshd_plugins.builtin.llama.running.recent import RecentRates, rates_in
from meshd_plugins.builtin.llama.running.residency import NoRoom, Seat
from meshd_plugins.builtin.llama.running.restarts import CRASHES_MAX, RestartPolicy
from meshd_plugins.builtin.llama.serving.describe import Announced, Standing, describe, explain_plan
from meshd_plugins.builtin.llama.serving.warmth import WarmPrefixes

FILE_LOOK_S: Final = 10.0  # how often the file of a quarantined model is looked at
LEAVE_S: Final = 30.0  # for requests in flight, when a model is removed
RATES_LOOK_S: Final = 5.0
ROOM_LOOK_S: Final = 5.0  # between two looks for room that nobody asked for
NONSENSE: Final = (ValueError, TypeError)  # of a worker; or a name that is malformed or taken
OF_THE_FILE: Final = ("family", "quantisation", "size_bytes", "modalities")
TOLD: Final = (*TABLES, "embedding", "prefill_tokens_per_s", "decode_tokens_per_s", "load_s")
MEASURED: Final = ("prefill_tokens_per_s", "decode_tokens_per_s", "load_s")


class Keeper:
    """One model of the node. `run` is its life; `use` is how requests get at its worker."""

    def __init__(
        self, tools: Tools, model: ModelConfig, key: str, *, library: bool = False
    ) -> None:
        """Keep a model under a key that is unique on the node; those of a library load on demand."""
        self.key = key
        self.model = model
        self._tools = tools
        self._keep = model.keep or ("demand" if library else "")
        self.state = State.STARTING
        self.reason = ""
        self._prepared: Prepared | None = None
        self._plan: Plan | None = None
        self._hello: Mapping[str, Value] | None = None  # of this life or of a former one
        self._lately = (0.0, 0.0)  # rates of late, prefill and decode, where they are announced
        self._recent = RecentRates(self._lately)
        self._announced = Announced(tools.context.capabilities)
        self._door = Door(tools.context.clock, tools.residency.notify)
        self._prefixes: WarmPrefixes | None = None
        self._unload = trio.Event()
        self._vacant = trio.Event()
        self._again = trio.Event()  # out of quarantine
        self._tried = trio.Event()  # it is known how the latest try ended
        self._again_s = 0.0  # when a quarantine ends by itself
        self._since_s = 0.0
        self._resident_bytes = 0
        self._eager = self._keep != "demand"
        self._retired = False
        self._spread: tuple[str, ...] = ()  # over other nodes, where it is split

    # -- what others see -------------------------------------------------------------------------------

    @property
    def worker(self) -> Worker | None:
        """The worker, while the model is in memory; whoever calls it so does not keep it there."""
        return self._door.worker

    @property
    def prefixes(self) -> WarmPrefixes | None:
        """What its worker keeps of requests; None while it is not in memory."""
        return self._prefixes if self._door.worker is not None else None

    @property
    def open_calls(self) -> int:
        """Requests that use it or wait for it."""
        return self._door.open_calls

    @property
    def seat(self) -> Seat:
        """What it takes, and how it is used."""
        need = self._plan.need if self._plan else None
        return Seat(
            key=self.key,
            label=self.label,
            host_bytes=max(need.host if need else 0, self._resident_bytes),
            device_bytes=need.device if need else 0,
            since_s=self._since_s,
            used_s=self._door.used_s,
            open_calls=self._door.open_calls,
            pinned=self._keep == "loaded",
        )

    @property
    def mapped_bytes(self) -> int:
        """Of its file in memory."""
        need = self._plan.need if self._plan else None
        return min(need.weights, need.host) if need else 0

    @property
    def label(self) -> str:
        """What people call it."""
        facts = self._hello.get("model") if self._hello else None
        family = facts.get("family") if isinstance(facts, Mapping) else None
        return str(family) if family else self.model.family or self.model.path

    def standing(self) -> dict[str, Value]:
        """How it stands, for people."""
        told: dict[str, Value] = {
            "state": self.state.value,
            "reason": self.reason,
            "keep": self._keep or "auto",
            "open_calls": self._door.open_calls,
        }
        if self._door.worker is not None:
            told["resident_bytes"] = self._resident_bytes
        if self.state is State.QUARANTINED:
            told["retry_in_s"] = self.retry_in_s
        hello = self._hello or {}
        told |= {name: hello[name] for name in MEASURED if name in hello}
        prepared = self._prepared
        if prepared is not None and isinstance(prepared.inspected.model, Mapping):
            told |= {name: prepared.inspected.model.get(name) for name in OF_THE_FILE}
        if self._spread and self._door.worker is not None:
            told["split"] = list(self._spread)
        if prepared is not None and self._plan is not None:
            told |= explain_plan(self._plan, prepared.threads)
        return told

    @property
    def retry_in_s(self) -> int:
        """Whole seconds until it is tried again by itself, while it is quarantined."""
        return max(0, round(self._again_s - self._tools.context.clock()))

    @property
    def lacking(self) -> str:
        """What it waits for from other nodes; "": nothing."""
        return ""

    # -- for requests ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def use(self, deadline_s: float) -> AsyncGenerator[Worker, None]:
        """The worker, loaded if need be; while the context lasts the model stays in memory.

        Raises:
            Refused: it cannot be loaded now (busy), takes longer than `deadline_s` to load (starting), or
                is not served (starting).
            Failed: it died while it was being loaded.
        """
        if self.state in (State.BACKING_OFF, State.QUARANTINED):
            raise Refused(f"{self.label} is {self.state}: {self.reason}", code="starting")
        load_s = (self._hello or {}).get("load_s")
        load_s = float(load_s) if isinstance(load_s, int | float) else 0.0
        async with self._door.use(self.label, deadline_s, load_s) as worker:
            yield worker

    async def bench(self) -> AsyncGenerator[Mapping[str, Value], None]:
        """Measure it, alone: items of progress, the last one `{"done": {...}}`; see `benching.bench`.

        What was measured is announced, and remembered for the next start.
        """
        if self.state in (State.BACKING_OFF, State.QUARANTINED):
            raise Refused(f"{self.label} is {self.state}: {self.reason}", code="starting")
        async with self._door.alone(self.label) as worker, aclosing(bench(worker)) as items:
            async for item in items:
                done = item.get("done")
                if not isinstance(done, Mapping):
                    yield item  # noqa: ASYNC119  closed by its reader, as every operation is
                    continue
                try:
                    hello = self._take_measured({**(self._hello or {}), **done})
                except NONSENSE as error:
                    raise Failed(str(error), code="failed") from error
                told = {"id": self.key, **{name: hello.get(name) for name in TOLD}}
                yield {"done": {**told, "resident_bytes": self._resident_bytes}}  # noqa: ASYNC119

    def _take_measured(self, hello: Mapping[str, Value]) -> Mapping[str, Value]:
        """What the worker says now is announced, and kept for the next start."""
        assert self._prepared is not None
        resident = hello.get("resident_bytes")
        self._resident_bytes = resident if isinstance(resident, int) else 0
        self._hello, self._recent = hello, RecentRates(rates_in(hello))
        self._lately = (0.0, 0.0)
        self._announce(resident=True)
        self._tools.figures.save(self._key(), hello)
        return hello

    # -- for who rules over several models -------------------------------------------------------------

    async def vacate(self) -> None:
        """Be unloaded; return when the memory is free."""
        self._door.close()
        self._unload.set()
        await self._vacant.wait()

    def try_again(self) -> None:
        """End the quarantine, if there is one."""
        self._tried = trio.Event()
        self._again.set()

    async def wait_tried(self) -> None:
        """Return when it is known how the try ended that was asked for."""
        await self._tried.wait()

    async def retire(self) -> None:
        """Announce it no longer, and give requests in flight some time. The caller then cancels `run`."""
        self._retired = True
        self._withdraw()
        with trio.move_on_after(LEAVE_S):
            while self._door.open_calls:
                await self._tools.residency.wait_changed()

    # -- its life --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve it, again and again, until cancelled."""
        policy, clock = RestartPolicy(self._tools.waits), self._tools.context.clock
        try:
            while True:
                self._enter(State.STARTING)
                self._since_s = clock()
                try:
                    await self._live()
                except CapabilityError as error:
                    self._door.refuse(Failed(error.message, code=error.code))
                    wait_s = policy.crashed(clock(), clock() - self._since_s)
                    reason = error.message
                    if wait_s is None:
                        reason = f"{CRASHES_MAX} crashes; the last: {reason}"
                        await self._quarantine(reason, policy)
                    else:
                        await self._back_off(reason, wait_s)
                except OSError as error:
                    reason = f"{self.model.path}: {error.strerror or error}"
                    await self._quarantine(reason, policy)
                except (PluginConfigError, ModelRefused, DoesNotFit, *NONSENSE) as error:
                    await self._quarantine(f"{self.model.path}: {error}", policy)
        finally:
            self._withdraw()
            self._door.refuse(Refused(f"{self.label} was removed", code="starting"))
            self._tried.set()

    def _enter(self, state: State, reason: str = "") -> None:
        self.state, self.reason = state, reason
        begun = state in (State.STARTING, State.LOADING)
        if not begun and (state is not State.COLD or reason or not self._unasked):
            self._tried.set()

    async def _back_off(self, reason: str, wait_s: float) -> None:
        self._withdraw()
        self._enter(State.BACKING_OFF, reason)
        log = self._tools.context.log
        log.warning("llama.worker_died", path=self.model.path, reason=reason, restart_in_s=wait_s)
        await trio.sleep(wait_s)

    async def _quarantine(self, reason: str, policy: RestartPolicy) -> None:
        """Leave it out, until the time is over, its file changes, or somebody asks for another try."""
        wait_s = policy.quarantined()
        self._withdraw()
        self._enter(State.QUARANTINED, reason)
        self._door.refuse(Refused(reason, code="starting"))
        log = self._tools.context.log
        log.error("llama.model_quarantined", path=self.model.path, reason=reason, for_s=wait_s)
        self._again, self._again_s = trio.Event(), self._tools.context.clock() + wait_s
        before = await self._seen()
        with trio.move_on_after(wait_s):
            while not self._again.is_set() and await self._seen() == before:
                with trio.move_on_after(FILE_LOOK_S):
                    await self._again.wait()
        if self._again.is_set():
            policy.asked()

    async def _seen(self) -> tuple[int, ...]:
        return await trio.to_thread.run_sync(files_seen, self.model)

    async def _live(self) -> None:
        """From the file to serving, until something breaks. Raises what `run` sorts."""
        await self._prepare()
        self._hello = self._tools.figures.load(self._key())
        try:
            self._announce_cold()
        except ValueError:  # what was kept is damaged: measure again
            self._tools.figures.forget(self._key())
            self._hello = None
        self._enter(State.COLD)
        while True:
            await self._wait_wanted()
            try:
                await self._load_and_serve()
                self._enter(State.COLD)
            except NoRoom as error:
                self._enter(State.COLD, str(error))
                self._door.refuse(Refused(f"{self.label}: {error}", code="busy"))
            self._announce_cold()

    async def _prepare(self) -> None:
        """Verify the files, have the header read, and choose how to load it on an empty machine."""
        tools = self._tools
        opened = await open_files(self.model, tools.context.state_dir, tools.disk)
        try:
            inspected = await inspect(tools.context, self.model, opened)
        finally:
            opened.close()
        whole = tools.residency.whole()
        inspected = replace(
            inspected, device_bytes=tools.residency.empty_devices(inspected.device_bytes)
        )
        room = capped(self.model, replace(whole, device_bytes=inspected.device_bytes))
        self._plan = self._choose(inspected, room)
        self._prepared = Prepared(
            opened.file.digest,
            tuple(each.digest for each in opened.adapters),
            opened.projector.digest if opened.projector is not None else "",
            inspected,
            tools.machine.threads(self.model.threads),
            self._plan,
        )

    def _choose(self, inspected: Inspected, room: Room) -> Plan:
        """How to load it where nothing else is loaded. Raises DoesNotFit."""
        return choose(inspected.shape, wish_of(self.model), room)

    def _key(self) -> str:
        """What the figures are kept under."""
        assert self._prepared is not None
        assert self._plan is not None, "chosen by `_prepare`"
        return key_of(self.model, self._prepared, self._plan)

    @property
    def _unasked(self) -> bool:
        """Whether it is loaded without being asked for."""
        return self._eager or self._hello is None

    async def _wait_wanted(self) -> None:
        """Return when it is asked for; at once for one that is to be in memory, or was never measured.

        When there was no room for one of these, it is tried again when something has changed.
        """
        if self._door.wanted.is_set() or (self._unasked and not self.reason):
            return
        async with trio.open_nursery() as nursery:
            if self._unasked:
                nursery.start_soon(self._room_changed, nursery.cancel_scope)
            await self._door.wanted.wait()
            nursery.cancel_scope.cancel()

    async def _room_changed(self, scope: trio.CancelScope) -> None:
        # Nothing tells when one that is in the way has been here for long enough.
        with trio.move_on_after(ROOM_LOOK_S):
            await self._tools.residency.wait_changed()
        scope.cancel()

    async def _load_and_serve(self) -> None:
        """Load it and serve until it is to be unloaded. Raises NoRoom, CapabilityError and the like."""
        tools, prepared = self._tools, self._prepared
        assert prepared is not None, "prepared by `_live`"
        async with AsyncExitStack() as stack:
            stack.callback(self._unseat)
            async with tools.residency.turn:
                self._plan = plan = await find_room(tools.residency, self.model, prepared)
                self._enter(State.LOADING)
                opened = await open_files(self.model, tools.context.state_dir, tools.disk)
                stack.callback(opened.close)
                prepared.check_same(opened)
                spec = worker_spec(self.model, opened, plan, prepared.threads.value)
                worker = await stack.enter_async_context(tools.context.supervisor.worker(spec))
                opened.close()
                check_refusal(worker.hello)
                self._seat(worker, plan)
            await self._until_over(worker)

    def _seat(self, worker: Worker, plan: Plan) -> None:
        """It is in memory: announce it, and let in who waits."""
        tools, prepared = self._tools, self._prepared
        assert prepared is not None, "prepared by `_live`"
        before = tools.figures.load(self._key()) or {}
        hello = {**worker.hello, "slots": plan.slots}
        if before.get("benched") is True:  # measured better than at a start
            hello |= {name: before[name] for name in KEPT if name in before}
        self._since_s = tools.context.clock()
        self._unload, self._vacant = trio.Event(), trio.Event()
        self._prefixes = WarmPrefixes(worker)
        self._take_measured(hello)
        self._enter(State.SERVING)
        tools.residency.take(self)
        self._door.open(worker)
        tools.context.log.info(
            "llama.model_ready",
            path=self.model.path,
            names=self.model.names,
            load_s=hello.get("load_s"),
            prefill_tokens_per_s=hello.get("prefill_tokens_per_s"),
            decode_tokens_per_s=hello.get("decode_tokens_per_s"),
            resident_bytes=self._resident_bytes,
            chat_template_error=hello.get("chat_template_error"),
        )

    def _unseat(self) -> None:
        """It is not in memory any more."""
        self._door.close()
        self._resident_bytes = 0
        self._tools.residency.leave(self.key)
        self._vacant.set()

    async def _until_over(self, worker: Worker) -> None:
        """Return when it is to be unloaded. Raises Failed when the worker died."""
        died: list[str] = []
        assert self._prefixes is not None, "made by `_seat`"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._prefixes.run)

            async def watch() -> None:
                died.append(await worker.wait_died())
                nursery.cancel_scope.cancel()

            async def unload() -> None:
                await self._unload.wait()
                nursery.cancel_scope.cancel()

            async def idle() -> None:
                await self._wait_idle()
                self._door.close()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            nursery.start_soon(unload)
            nursery.start_soon(idle)
            nursery.start_soon(self._follow_rates)
        self._door.close()
        if died:
            raise Failed(died[0], code="worker_died")
        self._eager = self._keep == "loaded"  # it had to go: it comes back when it is asked for
        self._tools.context.log.info("llama.model_unloaded", path=self.model.path)

    async def _wait_idle(self) -> None:
        """Return when nobody has asked for it for so long that it is unloaded."""
        clock, limit_s = self._tools.context.clock, self.model.idle_unload_s
        if self._keep != "demand" or not limit_s:
            await trio.sleep_forever()
        door = self._door
        while door.open_calls or clock() - door.used_s < limit_s:
            left_s = limit_s if door.open_calls else limit_s - (clock() - door.used_s)
            await trio.sleep(left_s)

    async def _follow_rates(self) -> None:
        """Announce the rates of late when they are others than those announced, and stay so."""
        assert self._prefixes is not None, "made by `_seat`"
        while True:
            await trio.sleep(RATES_LOOK_S)
            now = rates_in(self._prefixes.status)
            if self._recent.seen(now, self._tools.context.clock()):
                self._lately = now
                self._announce(resident=True)

    def _announce(self, *, resident: bool) -> None:
        """Say what it can do. Raises ValueError: a name is malformed or taken, or the figures are nonsense."""
        if self._retired:
            return
        assert self._hello is not None
        assert self._prepared is not None
        prefill, decode = self._lately
        scales = (each.scale for each in self.model.lora)
        adapters = tuple(zip(self._prepared.adapters, scales, strict=True))
        standing = Standing(resident, prefill, decode, adapters, self._spread)
        self._announced.say(
            describe(self.model, self._prepared.digest, self._hello, standing), self
        )

    def _announce_cold(self) -> None:
        """The same while it is not in memory; nothing, where it was never measured."""
        if self._hello is not None:
            self._announce(resident=False)

    def _withdraw(self) -> None:
        """Announce it no longer."""
        self._announced.withdraw()
