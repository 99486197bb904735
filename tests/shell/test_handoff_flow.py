"""A large state goes from one worker process to another one through a daemon that holds little of it.

The workers have no model; all else is real: the part of the worker that hands over, the supervisor and its pipes,
and the plugin's half in the daemon.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from tests.shell.support_handoff_flow import CALLER, LARGE, TAG, TOKENS
from tests.shell.support_streams import trio_test
from tests.shell.support_supervisor import RecordingLog
from trio.testing import wait_all_tasks_blocked

from meshd.shell.supervisor import ProcessSupervisor
from meshd_plugins.api import PrefixExport, Privacy, Value, Worker, WorkerSpec
from meshd_plugins.builtin.llama.serving.warmth import AHEAD_BYTES, WarmPrefixes

WORKER = Path(__file__).with_name("handoff_worker.py")
ROOT = Path(__file__).parents[2]
STATE_BYTES = LARGE.size_bytes(TOKENS)
HELD_BYTES_MAX = 4 * AHEAD_BYTES
"""Each way there is `AHEAD_BYTES`, once as frames and for a moment once more as what is in them."""


@asynccontextmanager
async def workers() -> AsyncGenerator[tuple[Worker, Worker], None]:
    """One that holds the state, and one that does not."""
    supervisor = ProcessSupervisor(RecordingLog())

    def spec(role: str) -> WorkerSpec:
        environment = {"PYTHONPATH": str(ROOT)}
        return WorkerSpec(role, (sys.executable, str(WORKER), role), environment=environment)

    async with supervisor.worker(spec("holds")) as one, supervisor.worker(spec("takes")) as two:
        yield one, two


async def slowly(exported: PrefixExport) -> AsyncGenerator[bytes, None]:
    """As the line takes it: meanwhile whoever could read ahead does."""
    while (data := await exported.receive()) is not None:
        await wait_all_tasks_blocked(0.002)
        yield data


async def kept(worker: Worker) -> Mapping[str, Value]:
    async with worker.call({"operation": "kept"}) as call:
        found = await call.receive()
    assert found is not None
    return found


@trio_test
async def test_a_large_state_flows_through_a_daemon_that_holds_little() -> None:
    async with workers() as (one, two):
        holder, taker = WarmPrefixes(one), WarmPrefixes(two)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            async with holder.export_prefix(TAG, CALLER, Privacy.LAN) as exported:
                assert exported.head.size_bytes == STATE_BYTES > 3 * HELD_BYTES_MAX
                tokens = await taker.import_prefix(exported.head, slowly(exported))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert tokens == TOKENS, "which it says only if hash and structure are right"
        assert peak - before < HELD_BYTES_MAX
        # And it can hand the same bytes on.
        async with (
            holder.export_prefix(TAG, CALLER, Privacy.LAN) as mine,
            taker.export_prefix(TAG, CALLER, Privacy.LAN) as theirs,
        ):
            assert mine.head == theirs.head


@trio_test
async def test_what_a_worker_holds_for_it_is_counted_and_let_go() -> None:
    async with workers() as (one, two):
        holder, taker = WarmPrefixes(one), WarmPrefixes(two)
        alone = await kept(one)
        async with holder.export_prefix(TAG, CALLER, Privacy.LAN) as exported:
            during = await kept(one)
            assert during["bytes"] == alone["bytes"], "it is the one that is kept"
            assert during["room"] == alone["room"] - alone["bytes"]  # type: ignore[operator]
            never = trio.Event()

            async def stalled() -> AsyncGenerator[bytes, None]:
                yield await exported.receive() or b""
                await never.wait()

            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(taker.import_prefix, exported.head, stalled())
                    while (await kept(two))["bytes"] == 0:
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            assert (await kept(two))["bytes"] == 0
        assert await kept(one) == alone
