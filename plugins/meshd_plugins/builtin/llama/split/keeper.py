"""The life of a model that is split over several nodes: as any model's, with lenders found before each load.

While too few lenders are there it is not announced; `standing` says which ones are missing and why. They are
looked for again and again, since nodes come and go: a lender that is lost is no crash of ours, and never leads
to quarantine. What does not end by itself is ended: a lender that falls silent by its own node, one whose node
falls silent by the stream to it, and a worker that hangs for whatever reason by the supervisor's deadline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import Final

import trio

from meshd_plugins.api import CapabilityError, Failed, PeerOffer, Refused, WorkerSpec
from meshd_plugins.builtin.llama.arguments import Arguments
from meshd_plugins.builtin.llama.models.digest import ModelRefused
from meshd_plugins.builtin.llama.running.fit import (
    BATCH_TOKENS,
    CONTEXT_USUAL,
    DoesNotFit,
    Need,
    Plan,
    Room,
    need,
)
from meshd_plugins.builtin.llama.running.keeping import State
from meshd_plugins.builtin.llama.running.launch import (
    Inspected,
    check_refusal,
    open_files,
    worker_spec,
)
from meshd_plugins.builtin.llama.running.lifecycle import Keeper
from meshd_plugins.builtin.llama.running.preparing import wish_of
from meshd_plugins.builtin.llama.running.restarts import BACKOFF_FIRST_S, BACKOFF_MAX_S, HEALTHY_S
from meshd_plugins.builtin.llama.split.config import AUTO, RpcConfig, read_rpc
from meshd_plugins.builtin.llama.split.coordinator import (
    Lines,
    Part,
    SplitWorker,
    connected,
    missing,
    plan,
    usable,
)
from meshd_plugins.builtin.llama.split.lending import NAME

LOOK_S: Final = 1.0  # how often lenders are looked for
SETTLE_S: Final = 5.0
"""For the other nodes that are named to be found, before the model is loaded without them."""


class SplitKeeper(Keeper):
    """One model of the node with layers on others."""

    _is_whole = False  # it is to be split only if it must be, and fits here
    _lacking = ""

    @property
    def lacking(self) -> str:
        """Why there are too few lenders."""
        return self._lacking

    def _choose(self, inspected: Inspected, room: Room) -> Plan:
        """Context and slots as wished for; what goes where is decided when the lenders are known."""
        if self.model.split == AUTO:
            with suppress(DoesNotFit):
                fitting = super()._choose(inspected, room)
                self._is_whole = True
                return fitting
        self._is_whole = False
        if not inspected.rpc_build:
            raise ModelRefused(
                "it is to be split, and this build of llama-cpp-python has no RPC: build it with GGML_RPC=on",
                "not_split",
            )
        wish, shape = wish_of(self.model), inspected.shape
        context = min(wish.context or CONTEXT_USUAL, shape.context_tokens or CONTEXT_USUAL)
        slots, batch = wish.slots or 1, wish.batch or BATCH_TOKENS
        whole = need(shape, context, slots, batch, flash=wish.flash_attention)
        return Plan(context, slots, batch, 0, whole)

    async def _load_and_serve(self) -> None:
        """Load it over the lenders that there are, again whenever one is lost, until it is to be unloaded."""
        if self._is_whole:
            await super()._load_and_serve()
            return
        clock, wait_s = self._tools.context.clock, BACKOFF_FIRST_S
        while True:
            parts = await self._lenders()
            began_s = clock()
            reason = await self._serve_over(parts)
            if not reason:
                return
            if clock() - began_s >= HEALTHY_S:
                wait_s = BACKOFF_FIRST_S
            self._door.refuse(Failed(reason, code="worker_died"))
            await self._back_off(reason, wait_s)
            wait_s = min(2 * wait_s, BACKOFF_MAX_S)

    async def _lenders(self) -> tuple[Part, ...]:
        """Wait for lenders that suffice."""
        assert self._prepared is not None, "prepared by `_live`"
        clock, nodes = self._tools.context.clock, self.model.split
        began_s = clock()
        while True:
            offers = self._tools.context.peers.offers(NAME)
            build = self._prepared.inspected.rpc_build
            found = usable(offers, build, nodes)
            complete = nodes == AUTO or len(found) == len(nodes)
            try:
                if not found and nodes != AUTO:
                    raise DoesNotFit("no lender is there")
                parts = self._placed(found)
                if complete or clock() - began_s >= SETTLE_S:
                    self._lacking = ""
                    return parts
            except DoesNotFit as error:
                self._wait_for(f"{error}; {missing(offers, build, nodes)}".rstrip("; "))
            await trio.sleep(LOOK_S)

    def _placed(self, found: dict[str, PeerOffer]) -> tuple[Part, ...]:
        """Raises DoesNotFit."""
        assert self._prepared is not None
        room = self._tools.residency.room().host_bytes
        shape, whole = self._prepared.inspected.shape, self._prepared.plan.need
        return plan(shape, whole, room, found, self.model.split)

    def _wait_for(self, reason: str) -> None:
        """Say once why it is not served."""
        self._lacking = reason
        if (self.state, self.reason) != (State.BACKING_OFF, reason):
            self._withdraw()
            self._enter(State.BACKING_OFF, reason)
            self._door.refuse(Refused(reason, code="starting"))
            self._tools.context.log.warning(
                "llama.lenders_missing", path=self.model.path, reason=reason
            )

    async def _serve_over(self, parts: Sequence[Part]) -> str:
        """Serve until it is to be unloaded (""), or until a lender is lost: why.

        Raises Failed: the worker died for another reason.
        """
        tools = self._tools
        lines: Lines | None = None
        try:
            async with AsyncExitStack() as stack:
                stack.callback(self._unseat)
                lines = await stack.enter_async_context(
                    connected(tools.context.peers, parts, tools.context.log)
                )
                await self._serve_on(lines, stack)
        except CapabilityError as error:
            if lines is not None and not lines.lost:
                raise
            return lines.lost[0] if lines is not None else error.message
        return ""

    async def _serve_on(self, lines: Lines, stack: AsyncExitStack) -> None:
        tools, prepared = self._tools, self._prepared
        assert prepared is not None
        whole = prepared.plan
        layers = prepared.inspected.shape.layers
        here = layers - sum(part.layers for part in lines.parts)
        async with tools.residency.turn:
            self._plan = dataclasses.replace(whole, need=_share(whole.need, here, layers))
            self._enter(State.LOADING)
            opened = await open_files(self.model, tools.context.state_dir, tools.disk)
            stack.callback(opened.close)
            prepared.check_same(opened)
            spec = worker_spec(self.model, opened, whole, prepared.threads.value)
            spec = split_spec(spec, lines, read_rpc(tools.context.config))
            running = await stack.enter_async_context(tools.context.supervisor.worker(spec))
            worker = SplitWorker(running, lines)
            opened.close()
            check_refusal(worker.hello)
            self._spread = lines.spread
            self._seat(worker, self._plan)
        await self._until_over(worker)


def split_spec(spec: WorkerSpec, lines: Lines, rpc: RpcConfig) -> WorkerSpec:
    """The worker of a model, with connections to lenders."""
    if not lines.parts:
        return spec
    *command, text = spec.argv
    arguments = dataclasses.replace(Arguments.from_text(text), parts=lines.remote_parts)
    return dataclasses.replace(
        spec,
        argv=(*command, arguments.to_text()),
        sockets=lines.sockets,
        private_loopback=True,
        shared_loopback=rpc.allow_loopback,
        hang_s=float(rpc.step_deadline_s) or None,
    )


def _share(whole: Need, here: int, layers: int) -> Need:
    """What is taken on this node. The tensors beside the layers are small beside them, and counted with them."""
    part = here / max(layers, 1)
    return Need(int(whole.weights * part), int(whole.kv * part), whole.buffers)
