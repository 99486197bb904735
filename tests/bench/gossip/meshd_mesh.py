"""Makes the mesh that the nodes of one bench run share, before any clock starts.

python -m tests.bench.gossip.meshd_mesh FOLDER NODES

`FOLDER/NAME` is the state folder of the node called NAME, with its identity; the founder's lets them in. The node program finds them through `MESHD_BENCH_MESH=FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from meshd.trust.identity import admit, init_mesh, load_identity

FOUNDER = ".founder"


def make_mesh(folder: Path) -> None:
    """Found a mesh in an existing or new folder."""
    init_mesh(folder / FOUNDER, "bench")


def add_node(folder: Path, name: str) -> Path:
    """Let a node in; its state folder."""
    state = folder / name
    admit(load_identity(folder / FOUNDER), state)
    return state


def main() -> None:
    """Make the mesh and its nodes n0, n1, ..."""
    folder, nodes = Path(sys.argv[1]), int(sys.argv[2])
    make_mesh(folder)
    for index in range(nodes):
        add_node(folder, f"n{index}")


if __name__ == "__main__":
    main()
