"""The implementations under test: how a node of each is started, and what is missing to start one.

Ours needs nothing but this environment. The peers are optional; see `peers/README.md`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench.gossip.figures import KINSHIP, MEMBERLIST, NAMES, OURS, SERF
from tests.bench.gossip.meshd_mesh import add_node, make_mesh

PRESET = "lan"
BUILD_DEADLINE_S = 300.0
VERSION_DEADLINE_S = 20.0
_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]


class MissingError(Exception):
    """An implementation cannot be run here; the text says what provides it."""


class Implementation(ABC):
    """One implementation.

    Attributes:
        name: in tables.
        starts_at_once: processes that start at the same time; more would only wait for each other.
        is_quick: it knows of a crash within a second or two, so that many can be measured.
        has_load_lane: its nodes publish a load when told to.
        tells_suspicions: it says when a node is no longer routed to, before that is dead.
    """

    name: str
    starts_at_once: int = 100
    is_quick: bool = False
    has_load_lane: bool = False
    tells_suspicions: bool = True

    @abstractmethod
    def argv(self, node: str, address: str, port: int) -> list[str]:
        """The command line of a node."""

    @abstractmethod
    def version(self) -> str:
        """What is measured, for the record."""

    def prepare(self, folder: Path, nodes: Sequence[str]) -> Mapping[str, str]:
        """Make what the nodes of one cluster need, in a folder of theirs; environment variables."""
        del folder, nodes
        return {}

    def keeping_seed(self, address: str) -> Mapping[str, str]:
        """Environment variables with which nodes know their seed for good, where joining is not enough."""
        del address
        return {}


class Ours(Implementation):
    """This repository, as it stands."""

    name = OURS
    starts_at_once = 6
    is_quick = True
    has_load_lane = True

    def argv(self, node: str, address: str, port: int) -> list[str]:
        """By module, so that the tree that is measured is the one the bench is of."""
        module = "tests.bench.gossip.meshd_node"
        return [sys.executable, "-m", module, node, address, str(port), PRESET]

    def version(self) -> str:
        """The commit, and whether the tree differs from it."""
        git = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
        done = subprocess.run(
            git, capture_output=True, text=True, timeout=VERSION_DEADLINE_S, check=False
        )
        return done.stdout.strip() or "no repository"

    def prepare(self, folder: Path, nodes: Sequence[str]) -> Mapping[str, str]:
        """A mesh, and an identity for each node."""
        make_mesh(folder)
        for node in nodes:
            add_node(folder, node)
        return {"MESHD_BENCH_MESH": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}


class Kinship(Implementation):
    """PyPI `kinship`, in a virtual environment of its own."""

    name = KINSHIP
    starts_at_once = 10

    def __init__(self) -> None:
        python = os.environ.get("PEER_PYTHON")
        if not python:
            raise MissingError(
                "set PEER_PYTHON to the Python of a virtual environment with it: "
                "`python3 -m venv DIR && DIR/bin/pip install kinship`, then PEER_PYTHON=DIR/bin/python"
            )
        self._python = python
        self._version = self._ask("import importlib.metadata as m; print(m.version('kinship'))")

    def _ask(self, program: str) -> str:
        done = subprocess.run(
            [self._python, "-c", program],
            capture_output=True,
            text=True,
            timeout=VERSION_DEADLINE_S,
            check=False,
        )
        if done.returncode != 0:
            raise MissingError(f"`{self._python} -m pip install kinship` (PEER_PYTHON lacks it)")
        return done.stdout.strip()

    def argv(self, node: str, address: str, port: int) -> list[str]:
        """With the preset of the same name."""
        program = _HERE / "peers" / "kinship_node.py"
        return [self._python, str(program), node, address, str(port), PRESET]

    def version(self) -> str:
        """Of the distribution."""
        return self._version

    def prepare(self, folder: Path, nodes: Sequence[str]) -> Mapping[str, str]:
        """The encryption key that all nodes share, as ours have one."""
        del folder, nodes
        return {"KINSHIP_KEY": os.urandom(32).hex()}

    def keeping_seed(self, address: str) -> Mapping[str, str]:
        """As a configuration file would."""
        return {"KINSHIP_SEEDS": address}


class HashiCorp(Implementation):
    """A library of HashiCorp, from Debian's source packages, built once per run.

    Args:
        name: of the library.
        scratch: where the program goes.
    """

    def __init__(self, name: str, scratch: Path) -> None:
        self.name = name
        self.tells_suspicions = False
        self._package = f"golang-github-hashicorp-{name}-dev"
        if shutil.which("go") is None or not self._version():
            packages = f"golang-go golang-github-hashicorp-memberlist-dev {self._package}"
            raise MissingError(f"`apt-get install {packages}`")
        self._program = scratch / f"{name}-node"
        build = ["go", "build", "-tags", name, "-o", str(self._program), "."]
        done = subprocess.run(
            build,
            cwd=_HERE / "peers" / "hashicorp",
            env={**os.environ, "GO111MODULE": "off", "GOPATH": "/usr/share/gocode"},
            capture_output=True,
            text=True,
            timeout=BUILD_DEADLINE_S,
            check=False,
        )
        if done.returncode != 0:
            raise MissingError(f"a node program that builds; it says: {done.stderr.strip()}")

    def _version(self) -> str:
        done = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${Version}", self._package],
            capture_output=True,
            text=True,
            timeout=VERSION_DEADLINE_S,
            check=False,
        )
        return done.stdout.strip()

    def argv(self, node: str, address: str, port: int) -> list[str]:
        """With the library's LAN defaults."""
        return [str(self._program), node, address, str(port), PRESET]

    def version(self) -> str:
        """Of the Debian package."""
        return self._version()


def implementation(name: str, scratch: Path) -> Implementation:
    """By name.

    Raises:
        MissingError: it cannot be run here.
    """
    if name == OURS:
        return Ours()
    if name == KINSHIP:
        return Kinship()
    if name in {MEMBERLIST, SERF}:
        return HashiCorp(name, scratch)
    raise MissingError(f"no such implementation; there are {', '.join(NAMES)}")
