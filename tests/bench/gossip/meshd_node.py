"""One node of ours in the gossip bench: the shipped code, driven over stdin, told on stdout.

    MESHD_BENCH_MESH=FOLDER python -m tests.bench.gossip.meshd_node NAME BIND_IP PORT PRESET

What runs is what the daemon runs: `GossipDriver` and `NodeCore` on real sockets, `PeerStreams` over mutual
TLS, sealed datagrams, Ed25519 records, epoch and snapshot on disk. What is left out is what does not
gossip: plugins, HTTP, mDNS, the log's rendering. The mesh is made beforehand by `meshd_mesh`.

Commands, a line each: `join ADDRESS[,ADDRESS]`, `meta TEXT` and `bcast TEXT` (write a key of our record),
`load on` and `load off` (publish a load), `members`, `loads`, `statistics`, `leave`, `quit`. End of input is `quit`.
Events, a line each: `T_NS KIND NAME TEXT`, see `events`.

`MESHD_LOAD=1`: begin with `load on`.
`MESHD_PROFILE=FILE`: write cProfile's figures there when told to quit.
"""

from __future__ import annotations

import cProfile
import gc
import os
import random
import secrets
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import trio

from meshd.core.config import PRESETS
from meshd.core.effects import Address, Effect
from meshd.core.events import (
    Event,
    MemberAlive,
    MemberFailed,
    MemberJoined,
    MemberLeft,
    MemberSuspected,
    MemberUpdated,
    MeshJoined,
    RecordChanged,
    SelfEpochRaised,
)
from meshd.core.membership import LocalNode, MemberState
from meshd.core.node import NodeCore
from meshd.core.sealing import Opener, Sealer
from meshd.shell.addresses import Listening, listen
from meshd.shell.driver import Command, GossipDriver
from meshd.shell.keeper import StateKeeper, load_store
from meshd.shell.storage import Storage
from meshd.shell.streams import IncomingCall, PeerStreams, StreamConfig
from meshd.shell.witness import WitnessStreams
from meshd.trust.identity import load_identity
from meshd_cms import Epoch, NodeId, Value
from meshd_plugins.api import Refused

META_KEY = "meta"
MESSAGE_KEY = "message"
LOAD_KEY = "load"
LOAD_INTERVAL_S = 2.0  # between samples, as the daemon's announcer takes them
LOAD_CHANGE_S = 15.0  # mean time between changes that are worth telling
SNAPSHOT_INTERVAL_S = 60.0
REMEMBERED_PEERS_MAX = 64
GC_THRESHOLD = 10_000  # as the daemon sets it
READ_BYTES = 4_096
COMMAND_BYTES_MAX = 4_096
UNKNOWN_ADDRESS: Address = ("0.0.0.0", 0)
SHOWN = {
    MemberSuspected: "SUSPECT",
    MemberAlive: "RECOVER",
    MemberFailed: "LEAVE",
    MemberLeft: "LEAVE",
}


def say(kind: str, name: str, text: object = "") -> None:
    """One event, now, in one write."""
    os.write(1, f"{time.time_ns()} {kind} {name} {text}\n".encode())


class StandardError:
    """A logger that tells what an operator may act on, and drops the rest unrendered."""

    def debug(self, event: str, **fields: object) -> None:
        """Dropped."""

    def info(self, event: str, **fields: object) -> None:
        """Dropped."""

    def warning(self, event: str, **fields: object) -> None:
        """Told."""
        print(event, fields, file=sys.stderr, flush=True)

    def error(self, event: str, **fields: object) -> None:
        """Told."""
        self.warning(event, **fields)


async def refuse(call: IncomingCall) -> Value:
    """Nothing is served here."""
    raise Refused("this node only gossips")


class Node:
    """The gossip half of a daemon.

    Made and run inside trio: what a snapshot holds is dated by its clock.

    Args:
        name: told to the others.
        listening: bound sockets.
        preset: name of the timers.
        state: state folder with an identity in it.
    """

    def __init__(self, name: str, listening: Listening, preset: str, state: Path) -> None:
        self._name = name
        self._log = StandardError()
        self._listening = listening
        self._config = PRESETS[preset]()
        self._address: Address = (listening.host, listening.port)
        self._load: Value = None
        self._publishing = os.environ.get("MESHD_LOAD") == "1"
        self._build(state)

    def _build(self, state: Path) -> None:
        """The wiring, as in the daemon's composition root."""
        identity = load_identity(state)
        self._storage = Storage(state)
        store = load_store(self._storage, identity, self._storage.next_epoch(), self._log)
        self._store = store
        me = LocalNode(identity.node_id, self._name, self._address)
        self._core = NodeCore(self._config, me, store, random.Random(secrets.randbits(64)))
        key, mesh = identity.datagram_key, identity.mesh_id
        self._sealer = Sealer(key, mesh, identity.node_id, store.epoch)
        opener = Opener((key,), mesh, identity.node_id)
        self._witness = WitnessStreams(
            identity.node_id,
            self._sealer,
            opener,
            lambda node, epoch, evident: self._driver.watch_ended(node, epoch, evident),
        )
        self._streams = PeerStreams(
            identity,
            StreamConfig(),
            epoch=store.epoch,
            handler=refuse,
            on_gossip=self._heard_on_stream,
            load=lambda: self._load,
            witness=self._witness.accept,
            log=self._log,
        )
        self._driver = GossipDriver(
            self._core,
            self._listening.datagrams,
            sealer=self._sealer,
            opener=opener,
            streams=self._streams,
            witness=self._witness,
            notify=self._notified,
            log=self._log,
        )
        self._keeper = StateKeeper(
            self._storage,
            store,
            self._live_peers,
            interval_s=SNAPSHOT_INTERVAL_S,
            peers_max=REMEMBERED_PEERS_MAX,
        )

    async def run(self) -> None:
        """Run until `quit`, `leave` or the end of input."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listening.streams))
        async with trio.open_nursery() as nursery:
            await nursery.start(self._streams.serve, [listener])
            await nursery.start(self._witness.run)
            await nursery.start(self._driver.run)
            nursery.start_soon(self._keeper.run)
            nursery.start_soon(self._publish_load)
            self._write(META_KEY, "v0")
            settle_garbage_collector()
            say("READY", self._name)
            await self._obey()
            nursery.cancel_scope.cancel()

    # -- events out ---------------------------------------------------------------------------------------

    def _notified(self, event: Event) -> None:
        match event:
            case MemberJoined():
                say("JOIN", event.name, self._text(event.node, META_KEY))
            case MemberSuspected() | MemberAlive() | MemberFailed() | MemberLeft():
                say(SHOWN[type(event)], event.name)
            case RecordChanged():
                self._record_changed(event)
            case MeshJoined():
                say("JOINED", self._name)
            case SelfEpochRaised():
                self._storage.try_keep_epoch(event.epoch)
                self._sealer.rekey(event.epoch)
                self._streams.raise_epoch(event.epoch)
                self._witness.renew()
            case MemberUpdated():
                self._streams.moved(event.node)
            case _:
                pass

    def _record_changed(self, event: RecordChanged) -> None:
        member = self._core.member(event.owner)
        if member is None or member.is_self:
            return
        if META_KEY in event.keys or event.reset:
            say("UPDATE", member.name, self._text(event.owner, META_KEY))
        if MESSAGE_KEY in event.keys:
            say("USER", member.name, self._text(event.owner, MESSAGE_KEY))

    def _text(self, owner: NodeId, key: str) -> str:
        value = self._store.get(owner, key)
        return value if isinstance(value, str) else ""

    def _heard_on_stream(self, sender: NodeId, epoch: Epoch, payload: bytes) -> None:
        member = self._core.member(sender)
        source = UNKNOWN_ADDRESS if member is None else member.address
        self._driver.stream_message(sender, epoch, source, payload)

    def _live_peers(self) -> tuple[Address, ...]:
        return tuple(
            view.address
            for view in self._core.members()
            if view.state is MemberState.ALIVE and not view.is_self
        )

    # -- commands in --------------------------------------------------------------------------------------

    async def _obey(self) -> None:
        async with trio.lowlevel.FdStream(os.dup(0)) as commands:
            buffer = b""
            while data := await commands.receive_some(READ_BYTES):
                *lines, buffer = (buffer + data).split(b"\n")
                assert len(buffer) <= COMMAND_BYTES_MAX, "a command without an end"
                for line in lines:
                    word, _, argument = line.decode().strip().partition(" ")
                    if word in {"quit", "leave"}:
                        await self._end(graceful=word == "leave")
                        return
                    self._command(word, argument)

    def _command(self, word: str, argument: str) -> None:
        match word:
            case "join":
                seeds = tuple(address_of(each) for each in argument.split(","))
                self._post(lambda core, now_s: core.join(seeds, now_s))
            case "meta":
                self._write(META_KEY, argument, told=True)
            case "bcast":
                self._write(MESSAGE_KEY, argument, told=True)
            case "load":
                self._publishing = argument == "on"
            case "members":
                say("MEMBERS", self._name, len(self._live_peers()) + 1)
            case "loads":
                self._tell_loads()
            case "statistics":
                for name, value in self._core.statistics().items():
                    say("STATISTIC", name, value)
            case _:
                say("UNKNOWN", self._name, word)

    def _tell_loads(self) -> None:
        for view in self._core.members():
            reading = self._core.soft.read(view.node, LOAD_KEY, trio.current_time())
            if reading is not None and not view.is_self:
                say("LOAD", view.name, f"{reading.age_s:.3f}")

    def _write(self, key: str, value: str, *, told: bool = False) -> None:
        def write(core: NodeCore, now_s: float) -> tuple[Effect, ...]:
            if told:
                say("SET", self._name, value)
            return core.set(key, value, now_s)

        self._post(write)

    def _post(self, command: Command) -> None:
        assert self._driver.post(command), "the bench waits for an answer to each command"

    async def _end(self, *, graceful: bool) -> None:
        if graceful:
            self._post(lambda core, now_s: core.leave(now_s))
            await trio.sleep(self._config.leave_linger_s)
            await self._keeper.save()

    # -- the load lane ------------------------------------------------------------------------------------

    async def _publish_load(self) -> None:
        """A quiet machine: its figures are sampled as often as the daemon does, and seldom differ by much."""
        draw = random.Random(secrets.randbits(64))
        await trio.sleep(draw.uniform(0.0, LOAD_INTERVAL_S))  # machines do not start in step
        while True:
            if self._publishing:
                if self._load is None or draw.random() < LOAD_INTERVAL_S / LOAD_CHANGE_S:
                    self._load = a_load(draw)
                self._post(partial(self._publish, self._load))
            await trio.sleep(LOAD_INTERVAL_S)

    def _publish(self, load: Value, core: NodeCore, now_s: float) -> tuple[Effect, ...]:
        return core.publish(LOAD_KEY, load, now_s)


def a_load(draw: random.Random) -> dict[str, Value]:
    """What the daemon of a machine with one model publishes."""
    return {
        "queue_max": 16,
        "draining": False,
        "busy": {"computation.gpt/model": [draw.randrange(3), 4]},
        "cpu": round(draw.random(), 2),
        "memory": round(draw.random(), 2),
    }


def address_of(text: str) -> Address:
    """`HOST:PORT`."""
    host, _, port = text.rpartition(":")
    return host, int(port)


def settle_garbage_collector() -> None:
    """As the daemon does once it is up."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def profiled(run: Callable[[], None], file: str) -> None:
    """Run under cProfile and write its figures."""
    profile = cProfile.Profile()
    try:
        profile.runcall(run)
    finally:
        profile.dump_stats(file)


def main() -> NoReturn:
    """Run one node."""
    name, host, port, preset = sys.argv[1:5]
    mesh = os.environ.get("MESHD_BENCH_MESH")
    if mesh is None or not (Path(mesh) / name).exists():
        sys.exit(
            "set MESHD_BENCH_MESH to a folder that "
            "`python -m tests.bench.gossip.meshd_mesh FOLDER NODES` made"
        )

    async def run() -> None:
        await Node(name, listen(host, int(port)), preset, Path(mesh) / name).run()

    file = os.environ.get("MESHD_PROFILE")
    if file is None:
        trio.run(run)
    else:
        profiled(lambda: trio.run(run), file)
    sys.exit(0)


if __name__ == "__main__":
    main()
