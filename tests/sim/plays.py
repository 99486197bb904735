"""The register of scenarios, and what most of them need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.sim.invariants import Violation
from tests.sim.world import World

from meshd.core.config import GossipConfig, lan
from meshd.core.events import MemberFailed
from meshd.core.membership import MemberState
from meshd_cms.types import NodeId


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has to show: figures by name."""

    world: World
    figures: dict[str, float]


Scenario = Callable[[World, int], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Play:
    """A scenario and what its nodes are configured to."""

    run: Scenario
    config: Callable[[], GossipConfig]


SCENARIOS: dict[str, Play] = {}


def scenario(function: Scenario) -> Scenario:
    """Register under the function's name, with the LAN preset."""
    return configured(lan)(function)


def configured(config: Callable[[], GossipConfig]) -> Callable[[Scenario], Scenario]:
    """Register under the function's name."""

    def register(function: Scenario) -> Scenario:
        SCENARIOS[function.__name__] = Play(function, config)
        return function

    return register


def play(name: str, seed: int, nodes: int, *, trace: bool = False) -> Outcome:
    """Run one scenario.

    Raises:
        Violation: with the seed and the command that replays it.
    """
    chosen = SCENARIOS[name]
    world = World(seed, chosen.config(), f"{name} --nodes {nodes}")
    if trace:
        world.trace_lines = []
    figures = chosen.run(world, nodes)
    world.check_all()
    return Outcome(world, figures)


def started(world: World, nodes: int) -> float:
    """All start at once and agree; returns how long that took."""
    world.add(nodes)
    return world.settle(10.0)


def no_false_deaths(world: World) -> None:
    """Nobody who did nothing was declared dead by somebody who did nothing."""
    if world.false_deaths:
        raise Violation(world.message(f"{world.false_deaths} false deaths"))


def deaths_told(world: World, *but_of: NodeId) -> int:
    """How often anybody told that somebody else than these is dead."""
    return sum(
        isinstance(event, MemberFailed) and event.node not in but_of for _, _, event in world.events
    )


def no_deaths(world: World, why: str, *but_of: NodeId) -> None:
    """Nobody told of a death, but of these."""
    told = deaths_told(world, *but_of)
    if told:
        raise Violation(world.message(f"{told} deaths were told {why}"))


def known_to_all(world: World, node_id: NodeId, *states: MemberState) -> Callable[[], bool]:
    """Whether every running node believes one of these states, or does not list it at all.

    Asked again and again: who did not know last is asked first.
    """
    pending: list[int] = []

    def is_known() -> bool:
        while True:
            while pending:
                life = world.nodes[pending[-1]].life
                view = None if life is None else life.core.member(node_id)
                if view is not None and view.state not in states:
                    return False
                pending.pop()
            lacking = [
                node.number
                for node, state in world.states_of_id(node_id)
                if state is not None and state not in states
            ]
            if not lacking:
                return True
            pending.extend(lacking)

    return is_known
