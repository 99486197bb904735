"""What a daemon costs when it does nothing: `python -m tests.bench.bench_daemon [--nodes 10] [--seconds 20]`.

Prints the time from the start of the process to readiness (the first answer on its socket, polled every
20 ms), resident memory, and the share of a core that each of N idle daemons of one mesh uses.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from tests.support_daemons import Mesh


def main() -> None:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Mesh(Path(folder)) as mesh:
        names = [f"n{index}" for index in range(options.nodes)]
        for name in names:
            mesh.init(name)
        starts: list[float] = []
        for name in names:
            began_s = time.monotonic()
            mesh.start(name, plugins=["hardware", "arithmetic"])
            starts.append(time.monotonic() - began_s)
        for daemon in mesh.daemons:
            mesh.wait_for_members(daemon, options.nodes)
        time.sleep(5.0)  # let the burst of joining die down
        before = [daemon.cpu_s() for daemon in mesh.daemons]
        time.sleep(options.seconds)
        spent = [
            (daemon.cpu_s() - was) / options.seconds
            for daemon, was in zip(mesh.daemons, before, strict=True)
        ]
        memory = [daemon.resident_bytes() / 2**20 for daemon in mesh.daemons]
    print(
        f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    )
    print(f"start to ready, s: median {statistics.median(starts):.2f}, max {max(starts):.2f}")
    print(f"resident, MiB: median {statistics.median(memory):.1f}, max {max(memory):.1f}")
    print(
        f"idle CPU with {options.nodes} nodes, % of a core: "
        f"median {100 * statistics.median(spent):.2f}, max {100 * max(spent):.2f}"
    )


if __name__ == "__main__":
    main()
