"""Real daemons on disks that are full, read-only, damaged, lost or full of something else.

Where a file system has to be mounted, the daemon gets a mount namespace of its own: nothing of it is seen
outside, and it is gone with the process.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.support_daemons import HOST, Daemon, Mesh

from meshd.shell.envelope import disclose, enclose

MESHD = [sys.executable, "-m", "meshd"]
ECHO = "computation.gpt/echo"
LOCAL = '[gossip]\npreset = "local"\n'
OFTEN = "[storage]\nsnapshot_interval_s = 1.0\n" + LOCAL
FILES = ("epoch", "epoch.copy", "peers", "store.snapshot")
NOT_STARTED = 78


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path, command=MESHD) as running:
        yield running


@pytest.fixture
def mounting() -> None:
    """Skip where a process may not mount for itself."""
    for tool in ("unshare", "nsenter", "mount"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        pytest.skip(f"no mount namespaces here: {tried.stderr.strip()}")


# -- what a daemon says and does ---------------------------------------------------------------------------


def status(daemon: Daemon) -> dict[str, Any]:
    told: dict[str, Any] = daemon.get("/mesh/v1/status")
    return told


def disk(daemon: Daemon) -> dict[str, Any]:
    counters: dict[str, Any] = status(daemon)["counters"]["storage"]
    return counters


def peers(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in daemon.get("/mesh/v1/peers")["peers"]}


def lines(daemon: Daemon, event: str) -> list[dict[str, Any]]:
    """The lines of its log with this event; whatever is no line of ours fails."""
    decoded = [json.loads(line) for line in daemon.log().splitlines()]
    return [line for line in decoded if line["event"] == event]


def kill(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.process.wait()


def stop(daemon: Daemon) -> None:
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(15) == 0


def again(mesh: Mesh, daemon: Daemon, *, wait: bool = True) -> Daemon:
    """The same node, with a new log."""
    (daemon.folder / "log").rename(daemon.folder / f"log-{time.monotonic_ns()}")
    return mesh.launch(daemon.name, daemon.port, daemon.http_port, wait=wait)


def known_as(mesh: Mesh, at: Daemon, daemon: Daemon) -> None:
    """Wait until `at` holds the node for alive in the epoch that it has."""

    def known() -> bool:
        row = peers(at)[daemon.name]
        return bool(row["state"] == "alive" and row["epoch"] == status(daemon)["epoch"])

    mesh.wait(f"{daemon.name} in its epoch", at, known)


def saved_epoch(state: Path) -> int:
    return max(
        int(disclose("epoch", 1, path.read_bytes()))
        for path in (state / "epoch", state / "epoch.copy")
    )


def with_peer(mesh: Mesh, sections: str = OFTEN) -> tuple[Daemon, Daemon]:
    """A node that serves, and one with all its files on disk."""
    first = mesh.start("first", plugins=["echo"], sections=LOCAL)
    node = mesh.start("node", sections=sections)
    state = node.folder / "state"
    mesh.wait_for_capability(node, ECHO)
    mesh.wait("its files", node, lambda: all((state / name).exists() for name in FILES))
    return first, node


# -- mounts ------------------------------------------------------------------------------------------------


class OwnMount:
    """Daemons that are started meanwhile have their state folder on a mount of their own."""

    def __init__(self, mesh: Mesh, state: Path, script: str) -> None:
        self._mesh, self._before = mesh, list(mesh.command)
        self._script = f'set -e; state={state}; {script}; exec "$@"'

    def __enter__(self) -> None:
        self._mesh.command = ["unshare", "-m", "/bin/sh", "-c", self._script, "sh", *self._before]

    def __exit__(self, *exception: object) -> None:
        self._mesh.command = self._before


BOUND = 'mount --bind "$state" "$state"'
READ_ONLY = f'{BOUND}; mount -o remount,bind,ro "$state"'
SMALL = (
    'cp -a "$state" "$state.kept"; mount -t tmpfs -o size=256k,mode=0700 tmpfs "$state"; '
    'cp -a "$state.kept/." "$state"'
)
FULL = f'{SMALL}; cat /dev/zero > "$state/filler" 2>/dev/null || true'


def inside(daemon: Daemon, *command: str) -> str:
    """Run a command where the daemon's mounts are seen."""
    where = ["nsenter", "-t", str(daemon.process.pid), "-m", "--"]
    done = subprocess.run([*where, *command], capture_output=True, text=True, check=True)
    return done.stdout


# -- a disk that refuses -----------------------------------------------------------------------------------


def test_on_a_disk_that_is_read_only_a_node_runs_and_rises_with_every_life(
    mesh: Mesh, mounting: None
) -> None:
    first, node = with_peer(mesh)
    state, files = node.folder / "state", {}
    kill(node)
    files = {name: (state / name).read_bytes() for name in FILES}
    spoken = [saved_epoch(state)]
    with OwnMount(mesh, state, READ_ONLY):
        for _ in range(3):
            node = again(mesh, node)
            mesh.wait_for_capability(node, ECHO)
            known_as(mesh, first, node)
            spoken.append(status(node)["epoch"])
            counters = disk(node)
            assert counters["epoch_kept"] is False
            assert counters["failures"] >= 2
            assert "Read-only" in counters["last_error"]
            (line,) = lines(node, "epoch.not_kept")[:1]
            assert line["level"] == "warning"
            assert str(state) in line["do"]
            kill(node)
    assert spoken == sorted(set(spoken))
    assert {name: (state / name).read_bytes() for name in FILES} == files
    node = again(mesh, node)  # writable again: what the peers remember comes back, and is kept
    known_as(mesh, first, node)
    assert status(node)["epoch"] > spoken[-1]
    assert disk(node)["epoch_kept"] is True
    assert saved_epoch(state) == status(node)["epoch"]


def test_a_disk_that_becomes_read_only_is_said_once_and_what_was_missed_is_made_up_for(
    mesh: Mesh, mounting: None
) -> None:
    first, node = with_peer(mesh)
    state = node.folder / "state"
    stop(node)
    with OwnMount(mesh, state, BOUND):
        node = again(mesh, node)
    inside(node, "mount", "-o", "remount,bind,ro", str(state))
    mesh.start("news", plugins=["echo"], sections=LOCAL)
    mesh.wait("the refusal", node, lambda: disk(node)["failures"] >= 3)
    assert disk(node)["refusing"] is True
    (line,) = lines(node, "state.write_refused")
    assert "Read-only" in line["error"]
    assert str(state) in line["do"]
    inside(node, "mount", "-o", "remount,bind,rw", str(state))
    mesh.wait("the end of it", node, lambda: disk(node)["refusing"] is False)
    assert len(lines(node, "state.write_recovered")) == 1
    kill(node)
    assert first.process.poll() is None
    assert b"news" in (state / "store.snapshot").read_bytes()


def test_on_a_disk_that_is_full_at_the_start_a_node_runs_and_keeps_its_epoch_later(
    mesh: Mesh, mounting: None
) -> None:
    first, node = with_peer(mesh)
    state = node.folder / "state"
    kill(node)
    with OwnMount(mesh, state, FULL):
        node = again(mesh, node)
    known_as(mesh, first, node)
    assert disk(node)["epoch_kept"] is False
    assert "No space" in disk(node)["last_error"]
    assert len(lines(node, "epoch.not_kept")) >= 1
    inside(node, "rm", str(state / "filler"))
    mesh.wait("the epoch to be kept", node, lambda: disk(node)["epoch_kept"] is True)
    header, _, epoch = inside(node, "cat", str(state / "epoch")).partition("\n")
    assert header.startswith("meshd-state epoch 1 ")
    assert int(epoch) == status(node)["epoch"]


def test_files_of_another_user_are_set_aside(mesh: Mesh) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    first, node = with_peer(mesh)
    state = node.folder / "state"
    kill(node)
    before = saved_epoch(state)
    # Root may read everything, so the daemon runs without that privilege.
    for name in FILES:
        (state / name).chmod(0)
    drop = "-dac_override,-dac_read_search"
    mesh.command = ["setpriv", "--inh-caps", drop, "--bounding-set", drop, *MESHD]
    node = again(mesh, node)
    mesh.wait_for_capability(node, ECHO)
    known_as(mesh, first, node)
    assert status(node)["epoch"] > before
    assert len(lines(node, "state.set_aside")) == 4
    assert "Permission denied" in lines(node, "state.set_aside")[0]["why"]


# -- damage ------------------------------------------------------------------------------------------------


def a_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def another_release(path: Path) -> None:
    kind = path.read_bytes().split(b" ")[1].decode()
    path.write_bytes(enclose(kind, 99, b"whatever that release writes"))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)


MIXES: dict[str, tuple[Callable[[Path], None], ...]] = {  # in the order of FILES
    "bits": (a_bit_flipped, a_bit_flipped, a_bit_flipped, a_bit_flipped),
    "cuts": (cut, another_release, zeros, zeros),
    "things": (a_folder, a_link_to_a_device, huge, a_link_to_a_device),
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_node_whose_every_file_is_damaged_starts_says_so_and_recovers_from_peers(
    mesh: Mesh, mix: str
) -> None:
    first, node = with_peer(mesh)
    state, before = node.folder / "state", status(node)
    kill(node)
    for name, damage in zip(FILES, MIXES[mix], strict=True):
        damage(state / name)
    node = again(mesh, node)
    mesh.wait_for_capability(node, ECHO)
    known_as(mesh, first, node)
    now = status(node)
    assert now["node"] == before["node"]
    assert now["epoch"] > before["epoch"]
    told = {line["file"]: line for line in lines(node, "state.set_aside")}
    assert set(told) == {str(state / name) for name in FILES}
    for line in told.values():
        assert line["level"] == "warning"
        assert line["why"]
        assert line["do"]
        assert Path(line["kept_as"]).parent == state
    assert len(lines(node, "epoch.lost")) == 1
    assert disk(node)["quarantined"] == 4
    mesh.wait("new files", node, lambda: all((state / name).is_file() for name in FILES))
    stop(node)
    node = again(mesh, node)
    assert disk(node)["quarantined"] == 0
    assert status(node)["epoch"] > now["epoch"]


def test_half_written_files_beside_the_good_ones_change_nothing(mesh: Mesh) -> None:
    _, node = with_peer(mesh)
    state = node.folder / "state"
    kill(node)
    for name in FILES:
        (state / f".{name}.new").write_bytes((state / name).read_bytes()[:20])
    before = saved_epoch(state)
    node = again(mesh, node)
    assert status(node)["epoch"] > before
    assert disk(node)["quarantined"] == disk(node)["failures"] == 0
    assert not lines(node, "state.set_aside")


# -- what cannot be started --------------------------------------------------------------------------------


def sentence_of_a_failed_start(daemon: Daemon) -> str:
    """The one sentence that a daemon which does not start says."""
    assert daemon.process.wait(20) == NOT_STARTED
    (sentence,) = daemon.log().splitlines()
    assert sentence.startswith("meshd: ")
    return sentence


def test_a_file_in_place_of_the_state_folder_is_one_sentence(mesh: Mesh) -> None:
    node = mesh.start("node")
    state = node.folder / "state"
    stop(node)
    state.rename(node.folder / "elsewhere")
    state.write_text("in the way")
    assert str(state) in sentence_of_a_failed_start(again(mesh, node, wait=False))


@pytest.mark.parametrize("name", ["node.key", "node.crt", "datagram.key", "mesh.toml", "root.crt"])
def test_a_key_file_that_is_cut_short_is_one_sentence_and_is_left_as_it_is(
    mesh: Mesh, name: str
) -> None:
    node = mesh.start("node")
    stop(node)
    path = node.folder / "state" / "identity" / name
    path.write_bytes(path.read_bytes()[:10])
    sentence = sentence_of_a_failed_start(again(mesh, node, wait=False))
    assert str(path.parent) in sentence
    assert "backup" in sentence or "install the release" in sentence
    assert len(path.read_bytes()) == 10


# -- epochs and keys that are lost -------------------------------------------------------------------------


def test_an_epoch_far_in_the_future_is_learnt_back_from_peers_and_kept(mesh: Mesh) -> None:
    first, node = with_peer(mesh)
    state = node.folder / "state"
    kill(node)
    ahead = saved_epoch(state) + 10**10  # its clock was 115 days ahead then
    for name in ("epoch", "epoch.copy"):
        (state / name).write_bytes(enclose("epoch", 1, str(ahead).encode()))
    node = again(mesh, node)
    assert status(node)["epoch"] == ahead + 1
    known_as(mesh, first, node)
    kill(node)
    for name in FILES:
        (state / name).unlink()  # all is lost but the key, and the clock is right again
    node = again(mesh, node)
    mesh.wait("the epoch to be learnt", node, lambda: status(node)["epoch"] > ahead + 1)
    known_as(mesh, first, node)
    mesh.wait_for_capability(node, ECHO)
    learnt = status(node)["epoch"]
    assert saved_epoch(state) == learnt
    kill(node)
    node = again(mesh, node)
    assert status(node)["epoch"] > learnt
    known_as(mesh, first, node)


def test_a_node_that_lost_its_key_is_another_one_and_the_old_one_expires(mesh: Mesh) -> None:
    short = LOCAL + "[gossip.overrides]\ndead_keep_s = 3.0\n"
    first = mesh.start("first", sections=short)
    node = mesh.start("node", plugins=["echo"], sections=short)
    mesh.wait_for_capability(first, ECHO)
    before, state = status(node)["node"], node.folder / "state"
    kill(node)
    shutil.rmtree(state / "identity")
    mesh.admit(state)
    node = again(mesh, node)
    mesh.wait_for_capability(first, ECHO)
    after = status(node)["node"]
    assert after != before

    def ids() -> set[str]:
        return {row["node"] for row in first.get("/mesh/v1/peers")["peers"]}

    def holders() -> set[str]:
        return {row["node"] for row in first.get("/mesh/v1/capabilities")["capabilities"]}

    mesh.wait("the new one", first, lambda: after in ids())
    mesh.wait("the old one to be gone", first, lambda: before not in ids(), deadline_s=40.0)
    assert after in ids()
    assert holders() == {after}


# -- wear --------------------------------------------------------------------------------------------------


def writes_of(daemon: Daemon) -> tuple[float, tuple[object, ...]]:
    """Uptime, and all there is to see of writes: by its own count, by its files, by the kernel."""
    now = status(daemon)
    files: list[tuple[str, int, int]] = []
    for path in sorted((daemon.folder / "state").rglob("*")):
        with suppress(FileNotFoundError):
            found = path.stat()
            files.append((str(path), found.st_ino, found.st_mtime_ns))
    kernel = Path(f"/proc/{daemon.process.pid}/io").read_text().splitlines()
    sent = next(line for line in kernel if line.startswith("write_bytes"))
    return now["uptime_s"], (now["counters"]["storage"]["writes"], sent, *files)


def test_an_idle_mesh_writes_nothing_at_all(mesh: Mesh) -> None:
    """Over ten times the interval at which a keeper looks for something to write."""
    first = mesh.start("first", plugins=["echo", "hardware"], sections=OFTEN)
    second = mesh.start("second", plugins=["echo", "hardware"], sections=OFTEN)
    mesh.wait_for_members(first, 2)
    mesh.wait_for_capability(second, ECHO, holders=2)
    for daemon in (first, second):
        since_s, before = writes_of(daemon)

        def quiet(daemon: Daemon = daemon) -> bool:
            nonlocal since_s, before
            now_s, now = writes_of(daemon)
            if now != before:
                since_s, before = now_s, now
            return now_s - since_s >= 10.0

        mesh.wait("ten seconds without a write", daemon, quiet, deadline_s=30.0)


def test_a_mesh_where_much_happens_writes_once_an_interval(mesh: Mesh) -> None:
    interval_s = 3.0
    sections = f"[storage]\nsnapshot_interval_s = {interval_s}\n" + LOCAL
    node = mesh.start("node", sections=sections)
    snapshot = node.folder / "state" / "store.snapshot"
    put_ns: list[int] = []
    for number in range(3):  # lives that come and go: something is new all the time
        other = mesh.start(f"other-{number}", plugins=["echo"], sections=LOCAL)
        known = len(put_ns)

        def written(known: int = known) -> bool:
            with suppress(FileNotFoundError):
                at_ns = snapshot.stat().st_mtime_ns
                if at_ns not in put_ns:
                    put_ns.append(at_ns)
            return len(put_ns) > known

        mesh.wait("a snapshot", node, written)
        kill(other)
    gaps_s = [(later - earlier) / 1e9 for earlier, later in pairwise(put_ns)]
    assert min(gaps_s) > 0.9 * interval_s


def test_seeds_are_not_needed_after_all_that(mesh: Mesh) -> None:
    first, node = with_peer(mesh)
    stop(node)
    config = node.folder / "meshd.toml"
    config.write_text(config.read_text().replace(f'["{HOST}:{first.port}"]', "[]"))
    (node.folder / "state" / "store.snapshot").write_bytes(b"")
    node = again(mesh, node)
    mesh.wait_for_members(node, 2)  # the peers' file is good
    mesh.wait_for_capability(node, ECHO)
