"""The gossip driver: what one peer or one disk makes impossible, ends nothing else."""

from __future__ import annotations

from math import inf
from typing import cast

import trio
import trio.testing
from tests.shell.support_log import KeptLog

from meshd.core.effects import Address, Effect, Lane, Send
from meshd.core.frames import FrameTooLarge
from meshd.core.node import NodeCore
from meshd.core.sealing import Opener, Sealer
from meshd.shell.driver import GossipDriver, Witnessing, open_datagram_socket
from meshd.shell.stream_errors import StreamError
from meshd_cms import NodeId

PEER = NodeId(b"p" * 16)
ELSEWHERE: Address = ("127.0.0.1", 9)


class QuietCore:
    """A node core without timers that does nothing by itself."""

    def deadline_s(self) -> float:
        return inf

    def start(self, now_s: float) -> tuple[Effect, ...]:
        return ()


class Failing:
    """A stream lane on which nothing gets through."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.asked = trio.Event()

    async def send_gossip(self, node: NodeId | None, address: Address, payload: bytes) -> None:
        self.asked.set()
        raise self._error

    async def ping(self, node: NodeId, address: Address) -> float:
        raise self._error


def survives(error: Exception) -> int:
    """How many failures are counted after one message that fails with `error`."""
    streams = Failing(error)
    driver = GossipDriver(
        cast("NodeCore", QuietCore()),
        open_datagram_socket("127.0.0.1", 0),
        sealer=cast("Sealer", None),
        opener=cast("Opener", None),
        streams=streams,
        witness=cast("Witnessing", None),
        notify=lambda event: None,
        log=KeptLog(),
    )

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(driver.run)
            driver.post(lambda core, now_s: (Send(ELSEWHERE, PEER, b"news", Lane.STREAM),))
            with trio.fail_after(5):
                await streams.asked.wait()
                await trio.testing.wait_all_tasks_blocked()
                served = trio.Event()

                def command(core: NodeCore, now_s: float) -> tuple[Effect, ...]:
                    served.set()
                    return ()

                driver.post(command)
                await served.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)
    return driver.statistics.stream_failures


def test_a_stream_that_breaks_is_counted() -> None:
    assert survives(StreamError("lost")) == 1
    assert survives(ConnectionResetError()) == 1


def test_a_message_that_a_peer_takes_no_frames_for_is_counted() -> None:
    assert survives(FrameTooLarge("300000 bytes; at most 4096 fit")) == 1
