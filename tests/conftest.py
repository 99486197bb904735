"""How tests run beside each other in several processes (`pytest -n N`, which `make test` does).

Every process has temporary folders, ports and network namespaces of its own. The tests of a file stay
together, in their order, so that what a module shares is built once; those of `integration` share one network.
Those of `e2e` have daemons of their own and mostly wait for them: each goes to the process that is free, and they
come before the tests that compute, which fill the gaps at the end.

A test marked `alone` measures: while it runs, no other does in any process.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

# As in a worker: ggml's threads that wait by spinning take the processor from all tests beside them. Read when the
# library is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell has what it starts in its background ignore Ctrl-C, and all that it starts in turn: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("alone", "integration", "e2e", "fuzz")
"""What begins first: the longest chains, then what waits."""


class Gate:
    """Any number of tests at once, or one alone; between processes, by two locked files.

    Everybody passes the door before the room. Who wants to be alone keeps the door shut from when it comes
    until it leaves: nobody enters after it, and it waits only for those who are inside.
    """

    def __init__(self, folder: Path) -> None:
        self._door = os.open(folder / "door", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._room = os.open(folder / "room", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._is_alone = False

    def enter(self, *, alone: bool) -> None:
        """Returns once the test may run."""
        if self._is_alone and alone:
            return
        assert not self._is_alone
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        fcntl.flock(self._door, kind)
        fcntl.flock(self._room, kind)
        if not alone:
            fcntl.flock(self._door, fcntl.LOCK_UN)
        self._is_alone = alone

    def leave(self) -> None:
        """After the test."""
        fcntl.flock(self._room, fcntl.LOCK_UN)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        self._is_alone = False


GATE = pytest.StashKey[Gate]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One process alone needs no gate. One of several gets its own, and a folder with a short name.

    Unix sockets lie in the temporary folders of tests, and their paths may have 107 bytes.
    """
    told: dict[str, str] = getattr(config, "workerinput", {})
    if "gate" in told:
        folder = Path(told["gate"])
        config.stash[GATE] = Gate(folder)
        config.option.basetemp = folder / told["workerid"].removeprefix("gw")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Pass the gate; stay inside if the next test measures as well."""
    gate = item.config.stash.get(GATE, None)
    if gate is None:
        return (yield)
    alone = is_alone(item)
    gate.enter(alone=alone)
    try:
        return (yield)
    finally:
        if not (alone and nextitem is not None and is_alone(nextitem)):
            gate.leave()


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


# -- who runs what -----------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order in which tests are handed out. Within a file it stays."""
    if GATE in config.stash:
        items.sort(
            key=lambda item: FIRST.index(place(item)) if place(item) in FIRST else len(FIRST)
        )


def place(item: pytest.Item) -> str:
    """The folder of a test, or that it measures."""
    return "alone" if is_alone(item) else item.path.parent.name


class Chains(LoadScopeScheduling):
    """Hands out whole files; of `integration` all at once, of `e2e` single tests where they share nothing."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False  # the order of collection stays
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        match Path(file).parent.name:
            case "integration":
                return "integration"
            case "e2e" if not shares(file):
                return nodeid
            case _:
                return file


@functools.cache
def shares(file: str) -> bool:
    """Whether its tests have something in common that is expensive to make."""
    return 'scope="module"' in (ROOT / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Chains:
    """Ours, whatever `--dist` says."""
    return Chains(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """Tell each process where the gate is."""
    folder = node.config._tmp_path_factory.getbasetemp()
    node.workerinput["gate"] = str(folder)
