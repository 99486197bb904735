"""One node of kinship in the gossip bench; see `events` beside this folder for the lines.

    python kinship_node.py NAME BIND_IP PORT PRESET

Runs in the virtual environment that has kinship, so it imports nothing of ours. `KINSHIP_KEY`: hex of the
key to encrypt with; `KINSHIP_SEEDS`: addresses it keeps for good, as a configuration file would have them.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from typing import Any

kinship: Any = importlib.import_module("kinship")


def say(kind: str, name: str, text: object = "") -> None:
    """One event, now, in one write."""
    os.write(1, f"{time.time_ns()} {kind} {name} {text}\n".encode())


def configuration(name: str, host: str, port: str, preset: str) -> Any:
    """The preset, with what a deployment sets."""
    seeds = [seed for seed in os.environ.get("KINSHIP_SEEDS", "").split(",") if seed]
    settings: dict[str, Any] = {
        "name": name,
        "bind": f"{host}:{port}",
        "seeds": seeds,
        "meta": {"v": "v0"},
    }
    key = os.environ.get("KINSHIP_KEY")
    if key:
        settings["keys"] = [bytes.fromhex(key)]
    else:
        settings["insecure_plaintext"] = True
    return getattr(kinship.Config, preset)(**settings)


def told(event: Any) -> None:
    """Print an event of the cluster."""
    match type(event).__name__:
        case "MemberJoined":
            say("JOIN", event.member.name, event.member.meta.get("v", ""))
        case "MemberUpdated":
            say("UPDATE", event.member.name, event.member.meta.get("v", ""))
        case "MemberDead" | "MemberLeft":
            say("LEAVE", event.member.name)
        case "MemberSuspect":
            say("SUSPECT", event.member.name)
        case "MemberRecovered":
            say("RECOVER", event.member.name)
        case "UserMessage":
            say("USER", "-", event.data.decode())
        case _:
            pass


async def follow(stream: Any) -> None:
    """Print all events."""
    async for event in stream:
        told(event)


async def join(cluster: Any, name: str, seeds: list[str]) -> None:
    """Join, and tell how it went."""
    try:
        say("JOINED", name, await cluster.join(seeds))
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the bench's log
        say("JOINERR", name, repr(error))


async def main() -> None:
    """Run one node until `quit` or the end of input."""
    name, host, port, preset = sys.argv[1:5]
    cluster = kinship.Cluster(configuration(name, host, port, preset))
    await cluster.start()
    say("READY", name)
    stream = cluster.events()
    for member in cluster.members():
        if member.name != name:
            say("JOIN", member.name, member.meta.get("v", ""))
    tasks = [asyncio.create_task(follow(stream))]
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := (await reader.readline()).decode().strip():
        command, _, argument = line.partition(" ")
        match command:
            case "join":
                tasks.append(asyncio.create_task(join(cluster, name, argument.split(","))))
            case "meta":
                say("SET", name, argument)
                await cluster.set_meta({"v": argument})
            case "bcast":
                say("SET", name, argument)
                await cluster.broadcast(argument.encode())
            case "members":
                say("MEMBERS", name, len(list(cluster.members())))
            case "quit":
                break
            case _:
                say("UNKNOWN", name, command)
    os._exit(0)


asyncio.run(main())
