"""How long a photo holds event loops: `python -m tests.bench.bench_media [--megabytes 5] [--requests 9]`.

Real daemons on loopback: one where the photo enters, one with the llama plugin's capability before a worker process that
looks at nothing, and one that adopted a server that does. The photo is sent to each way through the first, and the plugin
`media_gaps` in all of them tells the longest steps of their event loops meanwhile: the median of all requests, of the
processor time of the thread. Steps of the Python library alone (`json.loads`, msgpack) over the same photo are told beside
them, as they are one call each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from binascii import a2b_base64
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path

import msgpack
import trio
from tests.bench.media_gaps import GAPS, SEES
from tests.shell.support_adopt_servers import running, vllm
from tests.support_daemons import HOST, Daemon, Mesh
from tests.unit.support_media import image_part, jpeg, text_part

from meshd_plugins.api import Value

SHOWN = 5


def install(folder: Path) -> Path:
    """What makes the plugin found, beside the daemons; the folder is for PYTHONPATH."""
    told = folder / "bench_media-1.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-media\nVersion: 1\n")
    (told / "entry_points.txt").write_text("[meshd]\ngaps = tests.bench.media_gaps\n")
    return folder


async def post(daemon: Daemon, path: str, body: bytes) -> bytes:
    """The body of a 200."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    data = b""
    async with await trio.open_tcp_stream(HOST, daemon.http_port) as stream:
        await stream.send_all(head.encode() + body)
        async for part in stream:
            data += part
    first, _, rest = data.partition(b"\r\n\r\n")
    assert b" 200 " in first.split(b"\r\n")[0], data
    return rest


async def gaps(daemon: Daemon) -> list[tuple[float, str]]:
    """The longest steps of a daemon since this was asked last."""
    asked = json.dumps({"target": f"{GAPS}@{daemon.name}", "operation": "run", "prompt": "?"})
    lines = (await post(daemon, "/mesh/v1/ask", asked.encode())).split(b"\n")
    text = "".join(
        json.loads(line[line.find(b"{") :]).get("text", "") for line in lines if b'"text"' in line
    )
    return [(float(took_ms), str(place)) for took_ms, place in json.loads(text)]


async def measure(entry: Daemon, server: Daemon, photo: bytes, requests: int) -> None:
    """Send it so often, and print what it took."""
    found: dict[tuple[str, int], list[float]] = {}
    places: dict[tuple[str, int], str] = {}
    for _ in range(requests):
        for daemon in (entry, server):
            await gaps(daemon)
        await post(entry, "/v1/chat/completions", photo)
        for daemon in (entry, server):
            for rank, (took_ms, place) in enumerate((await gaps(daemon))[:SHOWN]):
                found.setdefault((daemon.name, rank), []).append(took_ms)
                places[daemon.name, rank] = place
    for key, taken in sorted(found.items()):
        name, rank = key
        print(f"{name:10} {rank + 1}.  {statistics.median(taken):7.2f} ms  ends in {places[key]}")


def time_calls(data: bytes) -> None:
    """The single calls over all of a photo that are in the steps, or would be."""
    body: Value = {"messages": [{"role": "user", "content": [image_part(data, "jpeg")]}]}
    photo = json.dumps(body).encode()
    packed = msgpack.packb(body)
    text = b64encode(data)
    calls: dict[str, Callable[[], object]] = {
        "json.loads of the body": lambda: json.loads(photo),
        "json.dumps of the body": lambda: json.dumps(body),
        "msgpack.packb of the body": lambda: msgpack.packb(body),
        "msgpack.unpackb of the body": lambda: msgpack.unpackb(packed),
        "blake2b of the body": lambda: blake2b(packed).digest(),
        "binascii of the photo": lambda: a2b_base64(text),
    }
    for name, call in calls.items():
        taken: list[float] = []
        for _ in range(9):
            began_ns = time.thread_time_ns()
            call()
            taken.append((time.thread_time_ns() - began_ns) / 1e6)
        print(f"{name:30} {statistics.median(taken):7.2f} ms")


async def run(folder: Path, size: int, requests: int) -> None:
    """Start all, and measure both ways."""
    source = str(Path(__file__).parents[2])
    path = os.pathsep.join([str(install(folder / "plugins")), source, *sys.path])
    data = jpeg(size)
    in_thread = trio.to_thread.run_sync
    with Mesh(folder, command=["env", f"PYTHONPATH={path}", sys.executable, "-m", "meshd"]) as mesh:
        async with running(vllm("Seer")) as adopted:
            tables = (
                f'[[plugins.adopt.servers]]\nurl = "{adopted.url}"\nmeasure = false\n'
                '[plugins.adopt.servers.modalities]\n"*" = ["image"]\n'
            )
            start = partial(mesh.start, plugins=["gaps"], wait=False)
            entry = start("entry")
            worker = start("serving", tables="[plugins.gaps]\nworker = true\n")
            adopt = start("adopting", plugins=["gaps", "adopt"], tables=tables)
            for holders, name in ((3, GAPS), (2, SEES)):
                await in_thread(mesh.wait_for_capability, entry, name, holders)
            for server in (worker, adopt):
                parts: list[Value] = [text_part("What is it?"), image_part(data, "jpeg")]
                body = {
                    "model": f"{SEES}@{server.name}",
                    "messages": [{"role": "user", "content": parts}],
                }
                await in_thread(mesh.wait_for_capability, server, GAPS, 3)
                await measure(entry, server, json.dumps(body).encode(), requests)
    time_calls(data)


def main() -> None:
    """Run it and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=5.0, help="of the photo, as a file")
    parser.add_argument("--requests", type=int, default=9, help="each way")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trio.run(run, Path(folder), int(options.megabytes * 1e6), options.requests)


if __name__ == "__main__":
    main()
