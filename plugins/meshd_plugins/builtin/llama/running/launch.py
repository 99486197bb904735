"""From a configured model to a worker: its files opened and verified, its header read, its process named.

The daemon parses nothing of a model file (decision 0024): a worker without a model reads the header first,
so that the memory a model takes is known before it is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from meshd_plugins.api import PluginConfigError, PluginContext, Value, WorkerSpec
from meshd_plugins.builtin.llama.arguments import Adapter, Arguments, Projector
from meshd_plugins.builtin.llama.config import ModelConfig, locate_model
from meshd_plugins.builtin.llama.models.digest import ModelFile, ModelRefused, open_verified
from meshd_plugins.builtin.llama.running.fit import NUMBER_MAX, Plan, Shape

INSPECT_DEADLINE_S: Final = 60.0
RPC_BUILD_CHARS_MAX: Final = 60
SHARES_MEMORY: Final = "igpu"

# How long ggml's threads wait for each other by turning before they fall asleep: some milliseconds. As long
# as each has a processor the wait is microseconds; while others compute there are fewer threads (decision 0033).
# ggml that aborts would start a debugger on itself.
WORKER_ENVIRONMENT: Final[Mapping[str, str]] = {
    "GOMP_SPINCOUNT": "100000",
    "GGML_NO_BACKTRACE": "1",
}
# For processes that do not change the number of their threads.
SLEEPING_ENVIRONMENT: Final[Mapping[str, str]] = {
    "OMP_WAIT_POLICY": "passive",
    "GGML_NO_BACKTRACE": "1",
}


@dataclass(slots=True)
class Opened:
    """The files of a model, open and verified. Closed by `close`, which may be called again."""

    path: Path
    file: ModelFile
    adapters: tuple[ModelFile, ...]
    projector: ModelFile | None = None

    @property
    def files(self) -> tuple[ModelFile, ...]:
        """All of them, the model's first."""
        beside = () if self.projector is None else (self.projector,)
        return (self.file, *self.adapters, *beside)

    def close(self) -> None:
        """Give the open files back."""
        for each in self.files:
            each.close()


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a worker says of a file that it has not loaded."""

    model: Value  # as `models.facts.facts_from_wire` reads it
    shape: Shape
    device_bytes: int  # free on GPUs with memory of their own
    rpc_build: str = ""  # what lenders must have too; "": it cannot be split here


def files_seen(model: ModelConfig) -> tuple[int, ...]:
    """What tells one state of its files from another, without opening them; those that are missing too."""
    beside = (*(lora.path for lora in model.lora), *filter(None, (model.projector,)))
    found: list[int] = []
    for path in (model.path, *beside):
        try:
            seen = locate_model(path).stat()
        except (OSError, PluginConfigError):
            found.append(0)
        else:
            found += [seen.st_ino, seen.st_size, seen.st_mtime_ns]
    return tuple(found)


async def open_files(model: ModelConfig, state_dir: Path, limiter: trio.CapacityLimiter) -> Opened:
    """Open and verify, in a thread. Raises OSError, PluginConfigError, ModelRefused."""
    path = locate_model(model.path)
    wanted = [(path, model.sha256), *((Path(each.path), each.sha256) for each in model.lora)]
    if model.projector:
        wanted.append((locate_model(model.projector), model.projector_sha256))
    files: list[ModelFile] = []
    try:
        for each, digest in wanted:
            verify = partial(open_verified, each, state_dir, digest)
            files.append(await trio.to_thread.run_sync(verify, limiter=limiter))
    except BaseException:
        for file in files:
            file.close()
        raise
    projector = files.pop() if model.projector else None
    return Opened(path, files[0], tuple(files[1:]), projector)


async def inspect(context: PluginContext, model: ModelConfig, opened: Opened) -> Inspected:
    """Have the header read, in a worker that then ends.

    Raises:
        ModelRefused: the header is broken.
        ValueError: the worker said nonsense.
        Failed: it died.
    """
    arguments = _arguments(model, opened, inspect=True)
    spec = _spec(arguments, opened, model, deadline_s=INSPECT_DEADLINE_S)
    async with context.supervisor.worker(spec) as worker:
        hello = worker.hello
    check_refusal(hello)
    return Inspected(
        hello.get("model"),
        Shape.from_wire(hello.get("shape")),
        _device_bytes(hello.get("devices")),
        str(hello.get("rpc_build", ""))[:RPC_BUILD_CHARS_MAX],
    )


def check_refusal(hello: Mapping[str, Value]) -> None:
    """Raise ModelRefused when that is what a worker said."""
    if "refused" in hello:
        raise ModelRefused(str(hello["refused"])[:500], str(hello.get("code")))


def worker_spec(model: ModelConfig, opened: Opened, plan: Plan, threads: int) -> WorkerSpec:
    """How the worker of a model is started."""
    arguments = _arguments(model, opened, plan=plan, threads=threads)
    return _spec(arguments, opened, model, deadline_s=model.start_deadline_s)


def _arguments(
    model: ModelConfig,
    opened: Opened,
    *,
    plan: Plan | None = None,
    threads: int = 1,
    inspect: bool = False,
) -> Arguments:
    return Arguments(
        file=opened.file.descriptor,
        path=str(opened.path),
        mark=opened.file.mark,
        digest=opened.file.digest,
        family=model.family,
        slots=plan.slots if plan else 1,
        context_tokens=plan.context_tokens if plan else 1,
        threads=threads,
        gpu_layers=plan.gpu_layers if plan else model.gpu_layers,
        batch_tokens=plan.batch_tokens if plan else 1,
        chunk_tokens=model.chunk,
        flash_attention=model.flash_attention,
        adapters=tuple(
            Adapter(file.descriptor, lora.path, file.digest, lora.scale)
            for file, lora in zip(opened.adapters, model.lora, strict=True)
        ),
        projector=_projector(model, opened.projector),
        shared_prompts=model.shared_prompts,
        kept_bytes_max=plan.need.kept if plan else 0,
        embeddings=model.embeddings,
        pooling=model.pooling,
        inspect=inspect,
    )


def _projector(model: ModelConfig, file: ModelFile | None) -> Projector | None:
    if file is None:
        return None
    return Projector(file.descriptor, model.projector, file.mark, file.digest)


def _spec(
    arguments: Arguments, opened: Opened, model: ModelConfig, *, deadline_s: float
) -> WorkerSpec:
    return WorkerSpec(
        name=f"llama:{opened.path.stem}",
        argv=(
            sys.executable,
            "-P",
            "-m",
            "meshd_plugins.builtin.llama.worker",
            arguments.to_text(),
        ),
        environment=WORKER_ENVIRONMENT,
        memory_bytes_max=model.memory_mib_max * 1024 * 1024 or None,
        start_deadline_s=deadline_s,
        gpu=arguments.gpu_layers != 0,
        files=tuple(each.descriptor for each in opened.files),
    )


def _device_bytes(value: Value) -> int:
    """Free memory of the GPUs that have their own. Raises ValueError: nonsense."""
    devices = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    free = 0
    for device in devices:
        table: Mapping[str, Value] = device if isinstance(device, Mapping) else {}
        count = table.get("free_bytes")
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= NUMBER_MAX:
            raise ValueError(f"the worker says that a device has {str(count)[:80]} bytes free")
        free += count if table.get("kind") != SHARES_MEMORY else 0
    return free
