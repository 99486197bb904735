"""What the resident memory of one of our nodes is made of.

python -m tests.bench.gossip.memory

Each stage is measured in a fresh process that imports what the stages before it import, too.
"""

from __future__ import annotations

import subprocess
import sys

from tests.bench.gossip.machine import MB

STAGES = (
    ("the interpreter", ""),
    ("trio, with ssl", "trio"),
    ("cryptography with X.509", "cryptography.x509"),
    ("the pure cores and msgpack", "meshd.core.node"),
    ("the rest of the shell", "tests.bench.gossip.meshd_node"),
)
DEADLINE_S = 30.0
_PROGRAM = """
import importlib, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
pages = int(open("/proc/self/statm").read().split()[1])
print(pages * os.sysconf("SC_PAGE_SIZE"))
"""


def measure_memory() -> list[tuple[str, float]]:
    """Stages with resident MB after each; the last is a node before it has sockets and peers."""
    figures: list[tuple[str, float]] = []
    modules: list[str] = []
    for title, module in STAGES:
        modules += [module] if module else []
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *modules],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        )
        figures.append((title, int(done.stdout) / MB))
    return figures


def main() -> None:
    """Print them."""
    before = 0.0
    for title, resident in measure_memory():
        print(f"{title:<32} {resident:6.1f} MB  (+{resident - before:.1f})")
        before = resident


if __name__ == "__main__":
    main()
