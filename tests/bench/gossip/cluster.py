"""The nodes of one implementation on one network: started, told, listened to, killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from tests.bench.gossip.events import ENDED, JOIN, Event, Pairs, Ready, Tally, parse
from tests.bench.gossip.implementations import Implementation
from tests.bench.gossip.networks import PORT, Network

SEED = 0  # number of the node that all join
READY_DEADLINE_S = 120.0
JOIN_DEADLINE_S = 120.0
READ_BYTES = 65_536
LINE_BYTES_MAX = 65_536
STDERR_SHOWN_BYTES = 1_500


class ClusterError(Exception):
    """A cell cannot be measured; the text says what a node failed to do, and what it said last."""


@dataclass(slots=True)
class _Process:
    popen: subprocess.Popen[bytes]
    output: trio.lowlevel.FdStream
    stopped: bool = False


class Cluster:
    """Nodes n0, n1, ...; use `running` to make one.

    Args:
        implementation: of all nodes.
        network: where they live; entered by the caller.
        count: of nodes.
        folder: for what they need and what they write to standard error.
        nursery: carries the tasks that listen to them.
        rng: chooses victims and writers.
    """

    def __init__(
        self,
        implementation: Implementation,
        network: Network,
        count: int,
        folder: Path,
        nursery: trio.Nursery,
        rng: random.Random,
    ) -> None:
        self.implementation = implementation
        self.network = network
        self.names = [f"n{number}" for number in range(count)]
        self.rng = rng
        self._folder = folder
        self._nursery = nursery
        self._processes: dict[int, _Process] = {}
        self._tallies: list[Tally] = []
        self._environment: dict[str, str] = {}

    def prepare(self, *, keep_seed: bool) -> None:
        """What the nodes need, before any clock starts."""
        made = self.implementation.prepare(self._folder, self.names)
        self._environment = {**os.environ, **made}
        if keep_seed:
            self._environment.update(self.implementation.keeping_seed(self.seed_address))

    # -- processes ----------------------------------------------------------------------------------------

    @property
    def running(self) -> list[int]:
        """Numbers of the nodes that run and are not stopped."""
        return [number for number, process in self._processes.items() if not process.stopped]

    async def start(self, numbers: Sequence[int]) -> None:
        """Start nodes, a few at once, and wait until each is ready.

        Raises:
            ClusterError: one was not.
        """
        at_once = self.implementation.starts_at_once
        for first in range(0, len(numbers), at_once):
            some = numbers[first : first + at_once]
            ready = Ready(some)
            with self.listening(ready):
                for number in some:
                    self._launch(number)
                await ready.wait(READY_DEADLINE_S)
                if ready.missing:
                    raise ClusterError(f"nodes {sorted(ready.missing)} do not get ready{self.said}")

    def _launch(self, number: int) -> None:
        node, address = self.names[number], self.network.address(number)
        argv = self.network.command(number, self.implementation.argv(node, address, PORT))
        with self._stderr.open("ab") as errors:
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self._environment,
                start_new_session=True,  # a Ctrl-C is for the bench, which then ends them
            )
        assert popen.stdout is not None
        output = trio.lowlevel.FdStream(os.dup(popen.stdout.fileno()))
        popen.stdout.close()
        self._processes[number] = _Process(popen, output)
        self._nursery.start_soon(self._listen, number, output)

    def send(self, number: int, line: str) -> None:
        """Give a node a command."""
        pipe = self._processes[number].popen.stdin
        assert pipe is not None
        try:
            pipe.write(line.encode() + b"\n")
            pipe.flush()
        except BrokenPipeError as error:
            raise ClusterError(f"node {number} has ended{self.said}") from error

    def kill(self, number: int) -> None:
        """End a node without a word."""
        popen = self._processes.pop(number).popen
        popen.kill()
        popen.wait()
        if popen.stdin is not None:
            popen.stdin.close()

    def stop(self, number: int) -> None:
        """Freeze a node: its host is silent from now on."""
        process = self._processes[number]
        process.stopped = True
        process.popen.send_signal(signal.SIGSTOP)

    def resume(self, number: int) -> None:
        """Undo `stop`."""
        process = self._processes[number]
        process.stopped = False
        process.popen.send_signal(signal.SIGCONT)

    def pid(self, number: int) -> int:
        """Of a node's process."""
        return self._processes[number].popen.pid

    def end(self) -> None:
        """End all nodes."""
        for number in tuple(self._processes):
            self.kill(number)

    # -- what they say ------------------------------------------------------------------------------------

    async def _listen(self, number: int, output: trio.lowlevel.FdStream) -> None:
        buffer = b""
        async with output:
            while data := await output.receive_some(READ_BYTES):
                *lines, buffer = (buffer + data).split(b"\n")
                assert len(buffer) <= LINE_BYTES_MAX, "a line without an end"
                for line in lines:
                    event = parse(line, number)
                    if event is not None:
                        self._tell(event)
        process = self._processes.get(number)
        if process is not None and process.output is output:  # it was not us who ended it
            self._tell(Event(time.time_ns(), number, ENDED, self.names[number], ""))

    def _tell(self, event: Event) -> None:
        for tally in self._tallies:
            tally.note(event)

    @contextmanager
    def listening(self, *tallies: Tally) -> Generator[None]:
        """These take in what the nodes say inside the block."""
        self._tallies.extend(tallies)
        try:
            yield
        finally:
            for tally in tallies:
                self._tallies.remove(tally)

    @property
    def _stderr(self) -> Path:
        return self._folder / "stderr.txt"

    @property
    def said(self) -> str:
        """The end of what the nodes wrote to standard error, as the end of a sentence."""
        try:
            text = self._stderr.read_bytes()[-STDERR_SHOWN_BYTES:].decode(errors="replace").strip()
        except FileNotFoundError:
            text = ""
        return f"; last on standard error: {text}" if text else ""

    # -- membership ---------------------------------------------------------------------------------------

    @property
    def seed_address(self) -> str:
        """Where all join."""
        return f"{self.network.address(SEED)}:{PORT}"

    def join(self, numbers: Sequence[int]) -> None:
        """Have nodes join the seed, all at once."""
        for number in numbers:
            self.send(number, f"join {self.seed_address}")

    async def assemble(self) -> None:
        """Start all, have all join, and wait until everybody knows everybody.

        Raises:
            ClusterError: that does not come about.
        """
        everybody = list(range(len(self.names)))
        await self.start(everybody)
        pairs = Pairs(self.names, {JOIN})
        with self.listening(pairs):
            self.join([number for number in everybody if number != SEED])
            if not await pairs.wait(JOIN_DEADLINE_S):
                known = f"{len(pairs.at_ns)} of {pairs.expected}"
                raise ClusterError(f"joined: {known} pairs{self.said}")


@asynccontextmanager
async def running(
    implementation: Implementation,
    network: Network,
    count: int,
    scratch: Path,
    *,
    seed: int = 1,
    keep_seed: bool = False,
) -> AsyncGenerator[Cluster]:
    """A cluster with nothing started yet; everything is ended on exit.

    Args:
        implementation: of all nodes.
        network: not entered yet.
        count: of nodes.
        scratch: a folder for the cluster's own.
        seed: of the choice of victims and writers.
        keep_seed: nodes know the seed for good, not only when they are told to join it.
    """
    folder = scratch / f"{implementation.name}-{count}-{os.urandom(4).hex()}"
    folder.mkdir(parents=True)
    try:
        with network:
            async with trio.open_nursery() as nursery:
                rng = random.Random(seed)
                cluster = Cluster(implementation, network, count, folder, nursery, rng)
                cluster.prepare(keep_seed=keep_seed)
                try:
                    yield cluster
                finally:
                    cluster.end()
                nursery.cancel_scope.cancel()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
