"""Time of one resolution: 100 nodes, 500 capabilities; p50 and p99 in microseconds.

Run: python -m tests.bench.bench_resolve [ROUNDS]

`hundred holders` is the hard case: one name served by every node, so that each resolution looks at a
hundred member states and returns a hundred candidates. `first time` is the cost after the index changed.
"""

from __future__ import annotations

import json
import sys
import time

from meshd_cms.types import NodeId
from meshd_naming import (
    Index,
    Name,
    Offer,
    PeerState,
    ResolveOptions,
    Resolver,
    parse_capability_name,
    parse_query,
)
from meshd_plugins.api import Rates

NODES = 100
QUERIES = {
    "exact": "knowledge.gpt/field-7/topic-3",
    "exact, operation and @node": "knowledge.gpt/field-7/topic-3@node-17",
    "ancestor fallback": "knowledge.gpt/field-7/topic-3/deep/deeper",
    "constrained": "knowledge.gpt/field-7/topic-3?context>=4096&quant>=q4",
    "wildcard": "knowledge.gpt/field-7/*",
    "hundred holders": "knowledge.gpt/general",
    "not found": "knowledge.gpt/generel-nowhere@nobody",
}


def mesh() -> tuple[Index, dict[NodeId, PeerState]]:
    index = Index()
    owners = [NodeId(number.to_bytes(16, "big")) for number in range(1, NODES + 1)]
    for number, owner in enumerate(owners):
        names = ["knowledge.gpt/general", f"computation.gpt/tool-{number % 10}"]
        names += [f"data.gpt/site-{number}/log", f"knowledge.gpt/field-{number % 10}"]
        names.append(f"knowledge.gpt/field-{number % 10}/topic-{number // 10 % 5}")
        for name in names:
            fields = {"context": 8192, "quant": "Q4_1", "zone": f"zone-{number % 3}"}
            rates = Rates(200.0, 10.0 + number)
            index.put(
                Offer(
                    owner,
                    f"node-{number}",
                    name,
                    parse_capability_name(name),
                    ("chat", "complete"),
                    fields,
                    rates=rates,
                )
            )
    return index, dict.fromkeys(owners, PeerState.ALIVE)


def percentiles(times_ns: list[int]) -> tuple[float, float]:
    times_ns.sort()
    return times_ns[len(times_ns) // 2] / 1e3, times_ns[len(times_ns) * 99 // 100] / 1e3


def measure(
    resolver: Resolver, index: Index, query: Name, rounds: int, *, fresh: bool
) -> list[int]:
    options = ResolveOptions(operation="chat")
    clock = time.perf_counter_ns
    times: list[int] = []
    for _ in range(rounds):
        index.generation += fresh
        start = clock()
        resolver.resolve(query, options, 10.0)
        times.append(clock() - start)
    return times


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    index, states = mesh()
    resolver = Resolver(index, NodeId(bytes(16)), states)
    figures: dict[str, dict[str, float]] = {}
    for title, text in QUERIES.items():
        query = parse_query(text)
        found = len(resolver.resolve(query, ResolveOptions(operation="chat"), 0.0).candidates)
        few = max(1, rounds // (20 if found == 0 else 1))
        p50, p99 = percentiles(measure(resolver, index, query, few, fresh=False))
        first, _ = percentiles(measure(resolver, index, query, max(1, few // 10), fresh=True))
        figures[title] = {"candidates": found, "p50_us": p50, "p99_us": p99, "first_us": first}
        print(
            f"{title:28} {found:4} candidates  p50 {p50:8.1f}  p99 {p99:8.1f}  first time {first:8.1f} us"
        )
    parse_start = time.perf_counter_ns()
    for _ in range(rounds):
        parse_query(QUERIES["constrained"])
    print(
        f"parse of the constrained query {(time.perf_counter_ns() - parse_start) / rounds / 1e3:.1f} us"
    )
    print(json.dumps({"nodes": NODES, "capabilities": len(index), "resolve": figures}))


if __name__ == "__main__":
    main()
