"""Keeps one worker a model running, and announces it while it runs.

A model is *starting*, *serving*, *backing off* or *quarantined*. It is announced only while it serves.
Before each start its file is opened and its digest verified; the worker is given that open file.
When the worker dies it starts again after 1, 2, 4, ... at most 60 seconds; when that happens
`CRASHES_MAX` times within `CRASH_WINDOW_S`, or its file cannot be used at all, it is quarantined: left
out, with the reason, until the daemon starts again. When no model is left the plugin itself gives up.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import AsyncExitStack
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final

import trio

from meshd_plugins.api import (
    CapabilityError,
    Descriptor,
    ModelFacts,
    Operation,
    PluginConfigError,
    PluginContext,
    Privacy,
    Rates,
    Value,
    Worker,
    WorkerSpec,
)
from meshd_plugins.builtin.llama.arguments import Arguments
from meshd_plugins.builtin.llama.capability import LlamaCapability
from meshd_plugins.builtin.llama.config import ModelConfig, locate_model
from meshd_plugins.builtin.llama.models.digest import ModelFile, ModelRefused, open_verified
from meshd_plugins.builtin.llama.models.facts import compatibility_key, facts_from_wire

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 60.0
CRASHES_MAX: Final = 5
CRASH_WINDOW_S: Final = 120.0
HEALTHY_S: Final = 60.0  # after serving this long the backoff begins anew

# ggml's threads wait for each other by spinning, unless told not to. With one other busy process on two
# cores that made a token take 2 s instead of 17 ms (decision 0010).
# ggml that aborts would start a debugger on itself.
WORKER_ENVIRONMENT: Final[Mapping[str, str]] = {
    "OMP_WAIT_POLICY": "passive",
    "GGML_NO_BACKTRACE": "1",
}


class State(Enum):
    """Of one model."""

    STARTING = "starting"
    SERVING = "serving"
    BACKING_OFF = "backing_off"
    QUARANTINED = "quarantined"


class RestartPolicy:
    """How long to wait before the next start; pure, told the time."""

    def __init__(self) -> None:
        self._crashes_s: deque[float] = deque(maxlen=CRASHES_MAX)
        self._backoff_s = BACKOFF_FIRST_S

    def crashed(self, now_s: float, served_s: float) -> float | None:
        """Return seconds to wait; None when it crashed too often to go on."""
        if served_s >= HEALTHY_S:
            self._backoff_s = BACKOFF_FIRST_S
        self._crashes_s.append(now_s)
        if len(self._crashes_s) == CRASHES_MAX and now_s - self._crashes_s[0] <= CRASH_WINDOW_S:
            return None
        wait_s = self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
        return wait_s


class LlamaPlugin:
    """The background task of the plugin."""

    def __init__(self, context: PluginContext, models: tuple[ModelConfig, ...]) -> None:
        self._context = context
        self._models = models
        self._digest_limiter = trio.CapacityLimiter(
            1
        )  # one file at a time: it is the disk that is slow
        self.states: dict[int, tuple[State, str]] = {}  # by place in the table: state and reason

    async def run(self) -> None:
        """Run every model until cancelled. Raises PluginConfigError when none is left."""
        async with trio.open_nursery() as nursery:
            for number, model in enumerate(self._models):
                nursery.start_soon(self._keep_running, number, model)
        reasons = "; ".join(reason for _, reason in self.states.values())
        raise PluginConfigError(f"no model can be served: {reasons}")

    async def _keep_running(self, number: int, model: ModelConfig) -> None:
        """Serve one model, again and again; returns when it is quarantined."""
        clock, log = self._context.clock, self._context.log
        policy = RestartPolicy()
        while True:
            self.states[number] = (State.STARTING, "")
            started_s = clock()
            try:
                reason = await self._serve(number, model)
            except CapabilityError as error:
                reason = error.message
            except (OSError, PluginConfigError, ModelRefused) as error:
                self._quarantine(number, model, f"{model.path}: {error}")
                return
            except (ValueError, TypeError) as error:  # the name is malformed or taken
                self._quarantine(number, model, f"{model.path}: {error}")
                return
            now_s = clock()
            wait_s = policy.crashed(now_s, served_s=now_s - started_s)
            if wait_s is None:
                self._quarantine(number, model, f"{CRASHES_MAX} crashes; the last: {reason}")
                return
            self.states[number] = (State.BACKING_OFF, reason)
            log.warning("llama.worker_died", path=model.path, reason=reason, restart_in_s=wait_s)
            await trio.sleep(wait_s)

    def _quarantine(self, number: int, model: ModelConfig, reason: str) -> None:
        self.states[number] = (State.QUARANTINED, reason)
        self._context.log.error("llama.model_quarantined", path=model.path, reason=reason)

    async def _open(self, model: ModelConfig) -> ModelFile:
        """Open the file and verify it. Raises OSError, PluginConfigError, ModelRefused."""
        path = locate_model(model.path)
        verify = partial(open_verified, path, self._context.state_dir, model.sha256)
        return await trio.to_thread.run_sync(verify, limiter=self._digest_limiter)

    async def _serve(self, number: int, model: ModelConfig) -> str:
        """Run one worker and announce it while it lives; return why it died.

        Raises CapabilityError; OSError, PluginConfigError and ModelRefused: the file cannot be used.
        """
        capabilities = self._context.capabilities
        file = await self._open(model)
        async with AsyncExitStack() as stack:
            stack.callback(file.close)
            spec = worker_spec(model, locate_model(model.path), file)
            worker = await stack.enter_async_context(self._context.supervisor.worker(spec))
            file.close()
            hello = worker.hello
            if "refused" in hello:
                raise ModelRefused(str(hello["refused"])[:500], str(hello.get("code")))
            facts = facts_from_wire(hello.get("model"), file.digest)
            announced = [LlamaCapability(d, worker) for d in describe(model, facts, worker)]
            added: list[str] = []
            try:
                for capability in announced:
                    capabilities.add(capability)
                    added.append(capability.descriptor.id)
                self.states[number] = (State.SERVING, "")
                self._context.log.info(
                    "llama.model_ready",
                    path=model.path,
                    names=model.names,
                    load_s=hello["load_s"],
                    prefill_tokens_per_s=hello["prefill_tokens_per_s"],
                    decode_tokens_per_s=hello["decode_tokens_per_s"],
                    resident_bytes=hello["resident_bytes"],
                    chat_template_error=hello["chat_template_error"],
                )
                return await worker.wait_died()
            finally:
                for capability_id in added:
                    capabilities.remove(capability_id)


def worker_spec(model: ModelConfig, path: Path, file: ModelFile) -> WorkerSpec:
    """How the worker of a model is started."""
    arguments = Arguments(
        file=file.descriptor,
        path=str(path),
        mark=file.mark,
        digest=file.digest,
        family=model.family,
        slots=model.slots,
        context_tokens=model.context,
        threads=model.threads,
        gpu_layers=model.gpu_layers,
    )
    return WorkerSpec(
        name=f"llama:{path.stem}",
        argv=(
            sys.executable,
            "-P",
            "-m",
            "meshd_plugins.builtin.llama.worker",
            arguments.to_text(),
        ),
        environment=WORKER_ENVIRONMENT,
        memory_bytes_max=model.memory_mib_max * 1024 * 1024 or None,
        start_deadline_s=model.start_deadline_s,
        gpu=model.gpu_layers != 0,
        files=(file.descriptor,),
    )


def describe(model: ModelConfig, facts: ModelFacts, worker: Worker) -> tuple[Descriptor, ...]:
    """Return what is announced: one descriptor a name."""
    hello = worker.hello
    facts = dataclasses.replace(facts, kv_key=compatibility_key(facts.digest, str(hello["build"])))
    by_batch = hello["decode_tokens_per_s_by_batch"]
    rates = Rates(
        prefill_tokens_per_s=_rounded(hello["prefill_tokens_per_s"]),
        decode_tokens_per_s=_rounded(hello["decode_tokens_per_s"]),
        decode_tokens_per_s_by_batch={int(size): _rounded(rate) for size, rate in by_batch.items()}
        if isinstance(by_batch, Mapping)
        else {},
        load_s=_rounded(hello["load_s"]),
    )
    operations = (Operation.CHAT, Operation.COMPLETE) if hello["chat"] else (Operation.COMPLETE,)
    size = (
        f"{facts.parameters / 1e6:.0f}M"
        if facts.parameters < 1e9
        else f"{facts.parameters / 1e9:.1f}B"
    )
    return tuple(
        Descriptor(
            name=name,
            operations=operations,
            summary=f"{facts.family} ({size} parameters, {facts.quantisation or 'unknown quantisation'})",
            slots=model.slots,
            privacy=Privacy[model.privacy.upper()],
            model=facts,
            rates=rates,
            fields={
                "context": hello["context_tokens"],
                "tokens_per_s": rates.decode_tokens_per_s,
                "quant": facts.quantisation.lower(),
                "model": facts.family,
            },
        )
        for name in model.names
    )


def _rounded(value: Value) -> float:
    assert isinstance(value, int | float)
    return round(float(value), 1)
