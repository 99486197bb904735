"""What the store costs with real Ed25519: run it with python from the repository's root; it prints figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.unit.support_cms import MESH, real_signer, real_store, real_verify, rumour, whole

from meshd_cms.codec import delta_size_bytes
from meshd_cms.store import Store
from meshd_cms.types import Epoch, StoreConfig, Version

OWNERS = 100
KEYS = 10


def report(what: str, run: Callable[[], object], repeats: int) -> None:
    run()
    start_s = time.perf_counter()
    for _ in range(repeats):
        run()
    each_us = (time.perf_counter() - start_s) / repeats * 1e6
    print(f"{what:58} {each_us:10.1f} us")


def record_of(number: int) -> Store:
    one = real_store(number)
    for key in range(KEYS):
        one.set(f"cap/knowledge.gpt/domain-{key}", {"slots": 1, "rate": 12.5, "summary": "x" * 60})
    return one


def main() -> None:
    owner = record_of(1)
    counter = iter(range(10**9))
    report("set (signs an entry and a head, 10 keys)", lambda: owner.set("k", next(counter)), 500)
    report("set, unchanged", lambda: owner.set("k2", 1), 2000)

    peer = real_store(2)
    peer.apply(whole(owner, owner.owner), 0.0)
    rumours = [rumour(owner.set("k", number)) for number in range(-501, 0)]
    print(f"one-entry rumour, encoded: {delta_size_bytes(rumours[0])} bytes")
    coming = iter(rumours)
    report("apply a one-entry rumour (verifies both)", lambda: peer.apply(next(coming), 0.0), 500)
    report("apply it again (known)", lambda: peer.apply(rumours[-1], 0.0), 5000)

    hub, fresh = real_store(3), real_store(4)
    stale = []
    for number in range(10, 10 + OWNERS):
        one = record_of(number)
        hub.apply(whole(one, one.owner), 0.0)
        stale.append(one)
    lines = hub.digest()
    report("digest, 100 owners", hub.digest, 500)
    report("wants, 100 owners, nothing", lambda: hub.wants(lines), 500)
    report("deltas_for, 100 owners, nothing to send", lambda: hub.deltas_for(lines, 1200), 500)
    one = stale[0]
    delta = one.set("k", 1)
    assert delta
    hub.apply(delta, 0.0)
    report("deltas_for, 100 owners, one is stale", lambda: hub.deltas_for(lines, 1200), 500)
    report("deltas_for, all unknown, 1200 bytes", lambda: hub.deltas_for((), 1200), 200)
    report("deltas_for, all unknown, all of it", lambda: hub.deltas_for((), 10**9), 20)
    everything = hub.deltas_for((), 10**9)
    start_s = time.perf_counter()
    for delta in everything:
        fresh.apply(delta, 0.0)
    print(f"apply all 100 records of {KEYS} keys: {(time.perf_counter() - start_s) * 1e3:.1f} ms")

    data = hub.snapshot()
    print(f"snapshot: {len(data)} bytes")
    report("snapshot, 100 owners", hub.snapshot, 20)
    report(
        "restore, 100 owners (verifies heads)",
        lambda: Store.restore(
            data, StoreConfig(), MESH, real_signer(3), Epoch(1), real_verify, as_of_s=0.0
        ),
        5,
    )
    assert hub.delta_since(stale[1].owner, Version(0), 1200) is not None


if __name__ == "__main__":
    main()
