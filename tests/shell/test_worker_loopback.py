"""A worker with a loopback of its own: it reaches itself, and nobody else reaches it or is reached."""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tests.shell.support_prying import NOBODY, Findings, Try, pry, pry_as_nobody, state_folder

LOOPBACK = {"private_loopback": True}
SHARED = {"private_loopback": True, "shared_loopback": True}


@dataclass(frozen=True)
class Case:
    """A worker that has tried everything, and a port of the machine."""

    found: Findings
    port: int
    socket: str


def attempts(port: int, unix: str) -> list[Try]:
    return [
        ("own_loopback", "127.0.0.1"),
        ("own_loopback", "0.0.0.0"),
        ("connect", str(port)),
        ("connect_unix", unix),
        ("open_socket", str(int(socket.AF_INET6))),
        ("open_socket", str(int(socket.AF_PACKET))),
        ("open_socket", str(int(socket.AF_NETLINK))),
        ("unshare", "1073741824"),
    ]


@pytest.fixture(scope="module", params=["as it is", "nobody"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Where network namespaces can be had."""
    nobody = request.param == "nobody"
    with (
        state_folder(NOBODY if nobody else os.geteuid()) as root,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as control,
    ):
        port, unix = int(listener.getsockname()[1]), str(root / "control.sock")
        control.bind(unix)
        control.listen()
        run = pry_as_nobody if nobody else pry
        yield Case(run(attempts(port, unix), root / "state", **LOOPBACK), port, unix)


def test_it_reaches_itself_and_nobody_else(case: Case) -> None:
    found = case.found
    if found.steps["loopback"].startswith("no: "):
        pytest.skip(f"no network namespace for this user: {found.steps['loopback']}")
    assert found.steps["loopback"] == "private"
    assert found.answers["own_loopback", "127.0.0.1"] == "connected"
    assert found.answers["own_loopback", "0.0.0.0"] == "connected"
    assert found.denied("connect", str(case.port))
    assert found.denied("connect_unix", case.socket)
    for family in (socket.AF_INET6, socket.AF_PACKET, socket.AF_NETLINK):
        assert found.denied("open_socket", str(int(family)))
    assert found.denied("unshare", "1073741824")


def test_nothing_is_exposed_by_it(case: Case) -> None:
    assert not [step for step in case.found.exposed if step.startswith("no_network")]
    assert "namespace" in case.found.steps["no_network"] or (
        case.found.steps["loopback"].startswith("no: ")
    )


def test_without_namespaces_it_gets_none_unless_the_shared_one_is_allowed() -> None:
    with (
        state_folder(NOBODY) as root,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        port = str(listener.getsockname()[1])
        wanted: list[Try] = [("own_loopback", "127.0.0.1"), ("connect", port)]
        refused = pry_as_nobody(wanted, root / "state", namespaces=False, **LOOPBACK)
        assert refused.steps["loopback"].startswith("no: ")
        assert refused.denied("own_loopback", "127.0.0.1")
        assert refused.denied("connect", port)
        shared = pry_as_nobody(wanted, root / "state", namespaces=False, **SHARED)
        assert shared.steps["loopback"] == "shared"
        assert shared.answers["own_loopback", "127.0.0.1"] == "connected"
        assert shared.answers["connect", port] == "connected"
        assert [step for step in shared.exposed if "the loopback of the machine" in step]


def test_the_shared_one_is_not_taken_where_a_private_one_can_be_had() -> None:
    with state_folder(os.geteuid()) as root, socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        found = pry([("connect", port)], root / "state", **SHARED)
        if found.steps["loopback"] == "shared":
            pytest.skip("no network namespace for this user")
        assert found.denied("connect", port)
