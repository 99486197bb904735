"""Makes the mesh that the nodes of one bench run share, before any clock starts.

python -m tests.bench.gossip.meshd_mesh FOLDER NODES

`FOLDER/mesh.enrolment` lets a node enrol; `FOLDER/NAME` is the state folder of the node called NAME, with
its identity. The node program finds them through `MESHD_BENCH_MESH=FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from meshd.trust.enrolment import enrol, write_enrolment
from meshd.trust.identity import init_mesh

ENROLMENT_FILE = "mesh.enrolment"
FOUNDER = ".founder"


def make_mesh(folder: Path) -> None:
    """Found a mesh in an existing or new folder, and write its enrolment file."""
    init_mesh(folder / FOUNDER, "bench")
    write_enrolment(folder / FOUNDER, folder / ENROLMENT_FILE)


def add_node(folder: Path, name: str) -> Path:
    """Enrol a node; its state folder."""
    state = folder / name
    enrol(state, folder / ENROLMENT_FILE)
    return state


def main() -> None:
    """Make the mesh and its nodes n0, n1, ..."""
    folder, nodes = Path(sys.argv[1]), int(sys.argv[2])
    make_mesh(folder)
    for index in range(nodes):
        add_node(folder, f"n{index}")


if __name__ == "__main__":
    main()
