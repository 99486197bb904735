"""Configured seeds: looked up beside everything else, until they are known."""

from __future__ import annotations

import socket

import pytest
import trio
from tests.shell.support_log import KeptLog

from meshd.core.effects import Address
from meshd.shell import seeds
from meshd.shell.addresses import ListenError, parse_seed
from meshd.shell.seeds import Seeds


def test_a_name_that_is_not_known_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "RETRY_FIRST_S", 0.01)
    asked: list[str] = []
    found: list[Address] = []
    log = KeptLog()

    def resolve(seed: str) -> Address:
        asked.append(seed)
        if seed == "late:1" and asked.count(seed) < 3:
            raise ListenError("not yet")
        return ("10.0.0.1", int(seed[-1]))

    looked_up = Seeds(["late:1", "early:2"], found=found.append, log=log, resolve=resolve)

    async def main() -> None:
        with trio.fail_after(10):
            await looked_up.run()

    trio.run(main)
    assert found == [("10.0.0.1", 2), ("10.0.0.1", 1)]
    assert looked_up.addresses == tuple(found)
    assert log.events() == ["seed.unresolved"] * 2


def test_a_name_with_addresses_of_both_kinds_is_reached_by_the_kind_we_listen_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both: dict[int, list[tuple[object, ...]]] = {
        socket.AF_INET6: [(socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("fd00::7", 7946, 0, 0))],
        socket.AF_INET: [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("10.0.0.7", 7946))],
    }

    def look_up(host: str, port: int, family: int = 0, kind: int = 0) -> list[tuple[object, ...]]:
        return [each for key, found in both.items() if family in (0, key) for each in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert parse_seed("kitchen.home:7946", "0.0.0.0") == ("10.0.0.7", 7946)
    assert parse_seed("kitchen.home:7946", "::") == ("fd00::7", 7946)
