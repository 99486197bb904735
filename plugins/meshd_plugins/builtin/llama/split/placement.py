"""Which layers of a model go where, when several nodes hold it. Pure.

The first layers stay on the node that has the file, with the table of tokens, what stands after the last
layer, and llama.cpp itself; the last ones go to the lenders, in order. A layer is its share of the weights
and of the KV memory. Whoever holds layers also needs the buffers of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshd_plugins.builtin.llama.running.fit import (
    GIB,
    MIB,
    PROCESS_BYTES,
    VOCABULARY_ENTRY_BYTES,
    DoesNotFit,
    Need,
    Shape,
)


@dataclass(frozen=True, slots=True)
class Lent:
    """Memory that another node offers."""

    node: str  # its name
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many layers fit where."""

    layer_bytes: int
    here: int
    lenders: tuple[int, ...]


def capacity_of(shape: Shape, need: Need, here_bytes: int, lenders: Sequence[Lent]) -> Capacity:
    """Return the most layers that each could hold."""
    layer = max(1, -(-(shape.block_bytes + need.kv) // max(shape.layers, 1)))
    step = need.buffers - PROCESS_BYTES - VOCABULARY_ENTRY_BYTES * shape.vocabulary
    rest = shape.weights_bytes - shape.block_bytes + need.buffers
    return Capacity(
        layer_bytes=layer,
        here=min(shape.layers, max(0, (here_bytes - rest) // layer)),
        lenders=tuple(
            min(shape.layers, max(0, (each.memory_bytes - step) // layer)) for each in lenders
        ),
    )


def choose_lenders(
    shape: Shape, need: Need, here_bytes: int, lenders: Sequence[Lent]
) -> tuple[Lent, ...]:
    """The fewest that make it fit, the largest first; none when it fits here. Raises DoesNotFit."""
    chosen: list[Lent] = []
    rest = sorted(lenders, key=lambda each: (-each.memory_bytes, each.node))
    while True:
        capacity = capacity_of(shape, need, here_bytes, chosen)
        if capacity.here + sum(capacity.lenders) >= shape.layers:
            return tuple(chosen)
        if not rest:
            raise DoesNotFit(_refusal(shape, need, here_bytes, lenders))
        chosen.append(rest.pop(0))


def place_layers(
    shape: Shape, need: Need, here_bytes: int, lenders: Sequence[Lent]
) -> tuple[int, ...]:
    """How many layers each lender gets, at least one; the others stay here. Raises DoesNotFit.

    In proportion to what each could hold: no device is filled to the brim while another one has room.
    """
    capacity = capacity_of(shape, need, here_bytes, lenders)
    room = (capacity.here, *capacity.lenders)
    enough = sum(room) >= shape.layers and shape.layers > len(lenders)
    if not enough or not all(capacity.lenders):
        raise DoesNotFit(_refusal(shape, need, here_bytes, lenders))
    exact = [shape.layers * each / sum(room) for each in room]
    layers = [int(each) for each in exact]
    for index in range(1, len(room)):
        layers[index] = max(1, layers[index])
    by_remainder = sorted(range(len(room)), key=lambda n: (layers[n] - exact[n], n))
    while sum(layers) < shape.layers:
        index = next(n for n in by_remainder if layers[n] < room[n])
        layers[index] += 1
        by_remainder.remove(index)
        by_remainder.append(index)
    while sum(layers) > shape.layers:
        layers[max(range(len(room)), key=lambda n: layers[n])] -= 1
    return tuple(layers[1:])


def _refusal(shape: Shape, need: Need, here_bytes: int, lenders: Sequence[Lent]) -> str:
    capacity = capacity_of(shape, need, here_bytes, lenders)
    parts = [f"{capacity.here} here ({here_bytes / GIB:.2f} GiB free)"]
    parts += [
        f"{layers} on {each.node} ({each.memory_bytes / GIB:.2f} GiB offered)"
        for each, layers in zip(lenders, capacity.lenders, strict=True)
    ]
    return (
        f"it needs {need.total / GIB:.2f} GiB: {shape.layers} layers of {capacity.layer_bytes // MIB} MiB, and "
        f"there is room for {', '.join(parts)}. Free memory, raise plugins.llama.rpc.offer_mib on a peer, or "
        f"take a smaller context"
    )
