"""A mesh that plays scripts: stands in for the daemon in tests of the edge and the command line.

Run as a program it serves the edge on a Unix socket until it is killed, or with `--once` until its first
ask is cancelled: `python -m tests.shell.support_fake_mesh SOCKET [--once]`. It prints what happens.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from meshd.config import HttpSection
from meshd.core.bodies import Bodies
from meshd.edge.app import build_app
from meshd.edge.counters import EdgeCounters
from meshd.edge.exposure import Exposure
from meshd.edge.limits import ConnectionLimits, EdgeLimits
from meshd.edge.server import EdgeSockets, open_edge_sockets, serve_edge
from meshd.orchestrate.events import (
    ANSWER,
    Answered,
    Ask,
    AskEvent,
    AttemptFailed,
    Piece,
    Planned,
    PlannedSubtask,
    Routed,
    SubtaskDone,
)
from meshd.orchestrate.metrics import Family
from meshd.orchestrate.service import Take
from meshd_naming import MissingSuffix, NotServed
from meshd_plugins.api import (
    BadRequest,
    Failed,
    Refused,
    TokenLogprob,
    ToolCallDelta,
    Usage,
    Value,
)

FAMILY = "SmolLM2-135M-Instruct"
NODE = "n" * 26
LIKELY = TokenLogprob(
    1, -0.5, b"Hm", (TokenLogprob(1, -0.5, b"Hm"), TokenLogprob(9, -1.5, b"\xff"))
)


class FakeMesh:
    """A `MeshService`. What it does with an ask is said by the target's last label.

    thinker    thoughts, text and two tool calls
    general    three pieces, then done            busy, gone, late, refused...   raises before the start
    torn       two pieces, then Failed            silent                         never says anything
    second     refused by pi, answered by nas
    unended    one piece, then just ends          endless                        a piece after the other
    bug        a ZeroDivisionError, before; latebug: after a piece
    """

    def __init__(self, gap_s: float = 0.0) -> None:
        self.asks: list[Ask] = []
        self.running = 0
        self.cancelled = trio.Event()
        self.started = trio.Event()
        self.left = False
        self.pieces = 0  # that were taken off us
        self.gap_s = gap_s
        self.worst = "warning"

    async def ask(self, ask: Ask, take: Take) -> None:
        self.asks.append(ask)
        self.running += 1
        self.started.set()
        try:
            async with aclosing(self._events(ask)) as events:
                async for event in events:
                    await take(event)
                    self.pieces += isinstance(event, Piece)
        except trio.Cancelled:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def _events(self, ask: Ask) -> AsyncGenerator[AskEvent, None]:
        label = ask.target.partition("?")[0].rpartition("/")[2]
        yield planned(ask)
        if label in RAISES:
            raise RAISES[label](ask)
        yield routed(ask)
        if label == "second":
            yield FULL
            yield replace(routed(ask), node_name="nas", attempt=2)
            yield Piece(ANSWER, "Hello")
            done = replace(part(ask), node_name="nas", failed=(FULL,))
            yield done
            yield Answered("stop", Usage(5, 3), (done,), 0.5)
            return
        match label:
            case "silent":
                await trio.sleep_forever()
            case "endless":
                while True:
                    yield Piece(ANSWER, "x" * 4096)
                    await trio.sleep(self.gap_s)
            case "torn" | "unended" | "latebug":
                yield Piece(ANSWER, "Once")
                if label == "torn":
                    raise Failed("the peer died", code="stream_lost")
                if label == "latebug":
                    raise ZeroDivisionError
                return
            case "document":
                data = "héllo\n".encode()
                yield Piece(ANSWER, data=data[:2], content_type="text/plain; charset=utf-8")
                yield Piece(ANSWER, data=data[2:])
            case "picture":
                yield Piece(ANSWER, data=b"\x89PNG\x00\xff", content_type="image/png")
            case "thinker":
                yield Piece(ANSWER, reasoning="Hm, ", token_ids=(1,), logprobs=(LIKELY,))
                yield Piece(ANSWER, reasoning="a tool.", token_ids=(2,), position=1)
                yield Piece(ANSWER, "Let me see.", tool_calls=(ToolCallDelta(0, "call_1", "f"),))
                yield Piece(ANSWER, tool_calls=(ToolCallDelta(0, arguments='{"a"'),))
                yield Piece(ANSWER, tool_calls=(ToolCallDelta(0, arguments=": 1}"),))
                yield Piece(ANSWER, tool_calls=(ToolCallDelta(1, "call_2", "g", "{}"),))
                yield part(ask)
                yield Answered("tool_calls", Usage(5, 3, 2), (part(ask),), 0.5)
                return
            case _:
                for i, text in enumerate(("Hello", ", ", "wörld")):
                    await trio.sleep(self.gap_s)
                    yield Piece(ANSWER, text, token_ids=(i,), position=i, seed=7)
        yield part(ask)
        yield Answered("stop", Usage(5, 3), (part(ask),), 0.5)

    def resolve(self, name: str) -> Mapping[str, Value]:
        if name.startswith("knowledge/"):
            raise MissingSuffix('no ".gpt"', text=name, column=10, suggestion="knowledge.gpt/x")
        served = "nothing" not in name
        row: dict[str, Value] = {
            "node": NODE,
            "node_name": "pi",
            "capability": "knowledge.gpt/general#12345678",
            "name": "knowledge.gpt/general",
            "match": "exact",
            "priority": 0,
            "weight": 100,
            "age_s": 1.25,
            "reason": "serves it exactly",
        }
        return {
            "query": name,
            "candidates": [row] if served else [],
            "left_out": [{**row, "node_name": "nano", "reason": "context 2048 is below 8192"}],
            "left_out_more": 0,
            "nearest": [] if served else ["knowledge.gpt/general"],
        }

    def status(self) -> Mapping[str, Value]:
        return {
            "name": "hub",
            "node": NODE,
            "mesh": "home",
            "uptime_s": 3725.0,
            "members": {"alive": 2, "suspect": 0},
            "health": {"errors": 0, "warnings": 2, "notes": 1},
            "counters": {
                "gossip": {"rumours_sent": 41, "suspicions_raised": 2},
                "dropped": {"opened": 9, "other_mesh": 3, "own": 0},
            },
            "key": b"\x01\xff",
        }

    def metrics(self) -> list[Family]:
        return [
            Family("meshd_members", "Members.", False, [({"state": "alive"}, 2.0)]),
            Family("meshd_gossip_rumours_sent_total", "Rumours.", True, [({}, 1234567.0)]),
        ]

    def store(self, node: str) -> Mapping[str, Value]:
        if node not in ("", "pi"):
            raise Refused(f"there is no node {node!r}", code="unknown_node")
        record: dict[str, Value] = {
            "node": NODE,
            "name": "pi",
            "state": "alive",
            "epoch": 7,
            "version": 12,
            "floor": 3,
            "complete": True,
            "keys": 1,
            "tombstones": 1,
            "size_bytes": 300,
            "age_s": 1.5,
        }
        if node:
            entry: dict[str, Value] = {"version": 12, "size_bytes": 150, "tombstone": False}
            record["entries"] = [
                {**entry, "key": "node", "value": {"name": "pi", "raw": b"\x01"}},
                {**entry, "key": "old", "value": None, "tombstone": True},
            ]
        return {"records": [record]}

    async def store_diff(self, node: str) -> Mapping[str, Value]:
        if node == "slow":
            try:
                self.started.set()
                await trio.sleep_forever()
            finally:
                self.cancelled.set()
        if node == "mute":
            raise Failed("no answer within 5 s", code="deadline_exceeded")
        behind: dict[str, Value] = {
            "node": "x" * 26,
            "name": "nano",
            "state": "alive",
            "behind": "there",
            "reason": "2 versions behind",
            "here": {"epoch": 7, "version": 5, "floor": 0},
            "there": None,
        }
        in_step = node == "twin"
        return {
            "node": NODE,
            "name": node,
            "records_here": 3,
            "records_there": 3,
            "in_step": in_step,
            "differences": [] if in_step else [behind],
        }

    async def doctor(self) -> Mapping[str, Value]:
        return {
            "worst": self.worst,
            "tally": {"errors": 0, "warnings": 1, "notes": 0},
            "findings": [
                {
                    "code": "clock_off",
                    "severity": "warning",
                    "says": "This node's clock is 31 s behind.",
                    "do": "Synchronise it.",
                }
            ],
        }

    def peers(self) -> list[Mapping[str, Value]]:
        return [
            {
                "node": NODE,
                "name": "pi",
                "address": "127.0.0.1:7946",
                "state": "alive",
                "self": False,
                "since_s": 12.0,
                "epoch": 7,
                "incarnation": 1,
                "heard_age_s": 0.25,
                "round_trip_ms": 0.4,
                "load_age_s": 0.5,
                "load": {"cpu": 0.25},
                "capabilities": 1,
                "serves": ["knowledge.gpt/general"],
            }
        ]

    def capabilities(self) -> list[Mapping[str, Value]]:
        common: dict[str, Value] = {
            "node": NODE,
            "state": "alive",
            "summary": "",
            "slots": 1,
            "busy": 0,
            "queued": 0,
            "decode_tokens_per_s": 120.5,
            "privacy": "mesh",
            "age_s": 2.0,
        }
        return [
            {
                **common,
                "name": "computation.gpt/arithmetic",
                "node_name": "nano",
                "operations": ["run"],
                "model": None,
            },
            {
                **common,
                "name": "knowledge.gpt/general",
                "node_name": "pi",
                "operations": ["chat", "complete"],
                "model": FAMILY,
            },
        ]

    def plugins(self) -> list[Mapping[str, Value]]:
        return [{"name": "echo", "state": "running", "reason": "", "capabilities": ["a"]}]

    def config(self) -> list[Mapping[str, Value]]:
        return [{"key": "http.port", "value": 8642, "origin": "default"}]

    async def leave(self) -> None:
        self.left = True


def _not_served(ask: Ask) -> Exception:
    text = f'no peer serves "{ask.target}" now'
    return NotServed(text, text=ask.target, suggestion="knowledge.gpt/general")


RAISES: Mapping[str, Callable[[Ask], Exception]] = {
    "busy": lambda ask: Refused("all slots are taken", code="busy"),
    "draining": lambda ask: Refused("stopping", code="draining"),
    "gone": _not_served,
    "late": lambda ask: Failed("too late", code="deadline_exceeded"),
    "died": lambda ask: Failed("the worker died", code="worker_died"),
    "words": lambda ask: BadRequest("no calculation in it", code="not_arithmetic"),
    "secret": lambda ask: Refused("not for the cloud", code="privacy"),
    "bug": lambda ask: ZeroDivisionError("a secret prompt"),
}


FULL = AttemptFailed(
    ANSWER, NODE, "pi", "cap#1", 1, refused=True, code="busy", reason="all\x1b[31m slots are taken"
)


def planned(ask: Ask) -> Planned:
    step = PlannedSubtask(ANSWER, ask.target, ask.operation, "prompt")
    return Planned("single", "asked by name", (step,))


def routed(ask: Ask) -> Routed:
    return Routed(ANSWER, NODE, "pi", "knowledge.gpt/general", "cap#1", "least loaded", 1)


def part(ask: Ask) -> SubtaskDone:
    return SubtaskDone(
        ANSWER, "pi", "knowledge.gpt/general", 0.08, 0.42, Usage(5, 3), "stop", {"rate": 7.1}
    )


@asynccontextmanager
async def serving(
    mesh: FakeMesh,
    folder: Path,
    limits: EdgeLimits | None = None,
    *,
    graceful_s: float = 0.2,
    stalled_s: float = 5.0,
    connections_max: int = 64,
    keep_alive_s: float = 60.0,
    connection_limits: ConnectionLimits | None = None,
    exposure: Exposure | None = None,
    counters: EdgeCounters | None = None,
    bodies: Bodies | None = None,
) -> AsyncGenerator[EdgeSockets, None]:
    """The real application on real sockets: TCP on a free port, and `folder/meshd.sock`."""
    certificate = None if exposure is None else exposure.certificate
    counters = counters or EdgeCounters()
    http = HttpSection(
        port=0,
        socket=folder / "meshd.sock",
        connections_max=connections_max,
        keep_alive_s=keep_alive_s,
    )
    sockets = open_edge_sockets(http)
    app = build_app(mesh, limits, exposure=exposure, counters=counters, bodies=bodies)
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            await serve_edge(
                app,
                sockets,
                graceful_s=graceful_s,
                limits=connection_limits or ConnectionLimits(stalled_s=stalled_s),
                tls=None if certificate is None else certificate.context,
                counters=counters,
                task_status=task_status,
            )

        await nursery.start(serve)
        yield sockets
        nursery.cancel_scope.cancel()


async def _main(path: Path, once: bool) -> None:
    mesh = FakeMesh(gap_s=0.01)
    sockets = open_edge_sockets(HttpSection(port=0, socket=path))
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            await serve_edge(build_app(mesh), sockets, graceful_s=0.2, task_status=task_status)

        await nursery.start(serve)
        print("ready", flush=True)
        await mesh.started.wait()
        print("asked", flush=True)
        await mesh.cancelled.wait()
        print("cancelled", flush=True)
        if once:
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_main, Path(sys.argv[1]), "--once" in sys.argv)
