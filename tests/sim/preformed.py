"""A mesh that formed long ago: every node holds every other, and the rumours of that have died down.

A thousand nodes that join at once are a million claims, each with its rumour; what is to be measured comes
after that. So the tables are filled by the same calls that a claim and a delta end in, the judgement of a
claim by `Members.accept` among them, and nothing is sent. A test compares such a mesh with one that joined.
"""

from __future__ import annotations

from tests.sim.agreement import Agreement
from tests.sim.machine import Life, SimNode
from tests.sim.world import World


def preform(world: World, nodes: int) -> None:
    """Start so many nodes that know each other, and each other's records."""
    begun: list[tuple[SimNode, Life]] = []
    for _ in range(nodes):
        node = world.machine()
        life = world.start(node)
        world.call(node, lambda core, now_s: core.start(now_s))
        world.write(node.number, "node", {"name": node.name, "epoch": int(life.store.epoch)})
        begun.append((node, life))
    updates = [life.core._context.own_update() for _, life in begun]
    records = [life.store._records[life.store.owner] for _, life in begun]
    for node, life in begun:
        context, store = life.core._context, life.store
        shown_s = node.clock.at(world.now_s)
        for update, record in zip(updates, records, strict=True):
            if update.node == node.id:
                continue
            context.members.accept(update, shown_s)
            store._records[update.node] = record  # records are never changed in place
            store._updated_at_s[update.node] = store._confirmed_at_s[update.node] = shown_s
        context.touch()
        life.core._claims.changed()
        world.rearm(node)
    assert Agreement(world).is_reached(), "a preformed mesh is one that agrees"
