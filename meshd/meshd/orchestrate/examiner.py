"""Takes the facts that the health checks read, from the parts of the daemon and from its peers.

Two depths. `quick` reads what is known already: for `meshd status`. `full` also asks every peer over a
stream, tests multicast on each interface, and where a store differs looks again a few seconds later: for
`meshd doctor`. It is bounded in peers, in calls at once and in time, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from meshd.core.effects import Address
from meshd.core.frames import PROTOCOL_VERSION
from meshd.core.membership import MemberState, MemberView
from meshd.health import (
    ClockFacts,
    DaemonFacts,
    DiskFacts,
    Facts,
    LoadFacts,
    MachineFacts,
    MdnsFacts,
    PeerAnswer,
    PeerFact,
    PluginFact,
    Report,
    SeedFact,
    StoreDifference,
    StrangerFact,
    Tally,
    WorkerFact,
    examine,
)
from meshd.orchestrate.incidents import Counters, Incidents
from meshd.orchestrate.inspection import Inspector, own_lines
from meshd.orchestrate.parts import Parts, at
from meshd.orchestrate.reporting import label, offences_value
from meshd.orchestrate.storeview import Difference, differences, lasting
from meshd.shell.addresses import interface_addresses
from meshd.shell.surroundings import machine_facts
from meshd_cms import NodeId, node_id_text
from meshd_plugins.api import Failed

PEERS_ASKED_MAX: Final = 128
CALLS_AT_ONCE: Final = 16
ASKING_S: Final = 12.0  # for everything that peers are asked
SECOND_LOOK_S: Final = 3.0  # repair takes 2 s
STRANGERS_S: Final = 600.0  # a source that has been silent for longer is no news
SILENCE_MIN_S: Final = 20.0
ROUNDS_OF_PROBES: Final = 3  # in which a live peer must have been heard, whatever is lost


@dataclass(slots=True)
class _Asked:
    """What peers said."""

    answers: dict[NodeId, PeerAnswer] = field(default_factory=dict[NodeId, PeerAnswer])
    differing: dict[NodeId, tuple[Difference, ...]] = field(
        default_factory=dict[NodeId, tuple[Difference, ...]]
    )


class Examiner:
    """Examines this node.

    Args:
        parts: what is read.
        inspector: asks peers.
        unix_s: the wall clock.
    """

    def __init__(self, parts: Parts, inspector: Inspector, unix_s: Callable[[], float]) -> None:
        self._parts = parts
        self._inspector = inspector
        self._unix_s = unix_s
        self._limiter = trio.CapacityLimiter(CALLS_AT_ONCE)
        self._one_at_a_time = trio.Lock()
        self.incidents = Incidents(partial(counters_that_tell, parts), trio.current_time)

    def quick(self) -> Tally:
        """What is wrong as far as it is known without asking anybody."""
        return examine(self._facts(None, _Asked(), None)).tally

    async def full(self) -> Report:
        """Ask around, and say what is wrong."""
        async with self._one_at_a_time:
            return examine(await self.facts())

    async def facts(self) -> Facts:
        """Everything that the checks read."""
        config = self._parts.config
        asked = _Asked()
        machine: list[MachineFacts] = []
        lasted: tuple[StoreDifference, ...] | None = None

        async def look_around() -> None:
            machine.append(
                await machine_facts(
                    config.listen.host, config.discovery.interfaces, mdns=config.discovery.mdns
                )
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_around)
            with trio.move_on_after(ASKING_S):
                await self._each(self._asked_peers(), partial(self._ask, asked))
                lasted = await self._second_look(asked)
        return self._facts(machine[0], asked, lasted)

    # -- asking peers ------------------------------------------------------------------------------

    def _asked_peers(self) -> tuple[MemberView, ...]:
        live = (view for view in self._parts.members().values() if view.state.is_live)
        return tuple(view for view in live if not view.is_self)[:PEERS_ASKED_MAX]

    async def _each(
        self, peers: Sequence[MemberView], ask: Callable[[MemberView], Awaitable[None]]
    ) -> None:
        async def limited(view: MemberView) -> None:
            async with self._limiter:
                await ask(view)

        async with trio.open_nursery() as nursery:
            for view in peers:
                nursery.start_soon(limited, view)

    async def _ask(self, asked: _Asked, view: MemberView) -> None:
        asked.answers[view.node] = await self._inspector.about(view.node, view.address)
        if not asked.answers[view.node].error:
            found = await self._differing(view)
            if found:
                asked.differing[view.node] = found

    async def _differing(self, view: MemberView) -> tuple[Difference, ...]:
        """Where the store of a peer differs from ours, in records of nodes that are there."""
        try:
            theirs = await self._inspector.lines(view.node, view.address)
        except Failed:
            return ()
        members = self._parts.members()
        return tuple(
            difference
            for difference in differences(own_lines(self._parts.store), theirs)
            if difference.owner in members and members[difference.owner].state is MemberState.ALIVE
        )

    async def _second_look(self, asked: _Asked) -> tuple[StoreDifference, ...]:
        if not asked.differing:
            return ()
        began_s = trio.current_time()
        await trio.sleep(SECOND_LOOK_S)
        names = self._parts.names()
        found: list[StoreDifference] = []

        async def look(view: MemberView) -> None:
            still = lasting(asked.differing[view.node], await self._differing(view))
            lasted_s = trio.current_time() - began_s
            found.extend(
                StoreDifference(label(each.owner, names), view.name, each.is_here_behind, lasted_s)
                for each in still
            )

        members = self._parts.members()
        await self._each([members[node] for node in asked.differing if node in members], look)
        return tuple(sorted(found, key=lambda each: (each.owner, each.peer)))

    # -- putting it together -----------------------------------------------------------------------

    def _facts(
        self,
        machine: MachineFacts | None,
        asked: _Asked,
        lasted: tuple[StoreDifference, ...] | None,
    ) -> Facts:
        epoch_ms = int(self._parts.store.epoch)
        return Facts(
            clock=ClockFacts(self._unix_s(), epoch_ms),
            daemon=self._daemon(asked, lasted),
            machine=machine,
            socket=str(self._parts.config.http.socket),
        )

    def _daemon(self, asked: _Asked, lasted: tuple[StoreDifference, ...] | None) -> DaemonFacts:
        parts, now_s = self._parts, trio.current_time()
        members = parts.members()
        names = parts.names()
        seen = parts.discovery.statistics
        lately = self.incidents.lately()
        window_s = self.incidents.window_s
        return DaemonFacts(
            node=node_id_text(parts.me),
            name=parts.config.node.name,
            mesh=parts.identity.mesh_name,
            address=at(parts.address()),
            software=parts.software,
            protocol=PROTOCOL_VERSION,
            up_s=now_s - parts.began_s,
            silence_max_s=self._silence_max_s(len(members)),
            mdns=MdnsFacts(
                enabled=parts.config.discovery.mdns,
                registered=seen.registered,
                last_error=seen.last_error,
                other_protocol=seen.other_protocol,
                other_mesh=tuple(parts.discovery.strangers),
            ),
            disk=self._disk(lately),
            load=LoadFacts(
                window_s=window_s,
                stalls=lately["stalls"],
                lost=lately["lost"],
                local_health=parts.driver.core.statistics()["local_health"],
                sent=lately["sent"],
                send_errors=lately["send_errors"],
                epochs_raised=self.incidents.epochs_raised(),
            ),
            workers=tuple(
                WorkerFact(worker.name, worker.isolation.exposed)
                for worker in parts.supervisor.statistics()
                if worker.ready
            ),
            plugins=tuple(
                PluginFact(plugin, complaint.message, complaint.remedy, complaint.is_error)
                for plugin, complaints in parts.plugin_complaints().items()
                for complaint in complaints
            ),
            peers=tuple(
                PeerFact(
                    node=node_id_text(view.node),
                    name=view.name,
                    address=at(view.address),
                    state=view.state,
                    since_s=max(0.0, now_s - view.since_s),
                    heard_ago_s=self.heard_ago_s(view.node),
                    answer=asked.answers.get(view.node),
                )
                for view in members.values()
                if not view.is_self
            ),
            seeds=self._seeds(members),
            remembered=len(parts.discovered.remembered),
            strangers=self._strangers(now_s),
            contested=tuple(
                (at(address), label(holder, names), label(other, names))
                for address, holder, other in self.incidents.contested()
            ),
            doubles={
                label(node, names): tuple(map(at, addresses))
                for node, addresses in self.incidents.doubles().items()
            },
            offences=offences_value(parts),
            differences=lasted,
            trust=parts.trust.facts(),
        )

    def heard_ago_s(self, node: NodeId) -> float | None:
        """Seconds since the last datagram of a node; None when there was none."""
        heard_s = self._parts.driver.contacts.heard_s(node)
        return None if heard_s is None else max(0.0, trio.current_time() - heard_s)

    def _silence_max_s(self, nodes: int) -> float:
        """A live peer probes us once a round of the mesh."""
        interval_s = self._parts.driver.core.config.probe_interval_s
        return max(SILENCE_MIN_S, ROUNDS_OF_PROBES * nodes * interval_s)

    def _disk(self, lately: Counters) -> DiskFacts:
        statistics = self._parts.storage.statistics
        return DiskFacts(
            folder=str(self._parts.config.node.state_dir),
            error=statistics.last_error if statistics.refusing or lately["disk_failures"] else "",
            set_aside=statistics.quarantined,
        )

    def _seeds(self, members: Mapping[NodeId, MemberView]) -> tuple[SeedFact, ...]:
        live = {view.address for view in members.values() if view.state.is_live}
        found: list[SeedFact] = []
        for seed, address in self._parts.seeds.resolved().items():
            silent = address is not None and self.incidents.is_silent(address)
            text = None if address is None else at(address)
            found.append(SeedFact(seed, text, silent and address not in live))
        return tuple(found)

    def _strangers(self, now_s: float) -> tuple[StrangerFact, ...]:
        own_port = self._parts.address()[1]
        ours: set[Address] = {(host, own_port) for host in interface_addresses()}
        ours.add(self._parts.address())
        return tuple(
            StrangerFact(reason, at(each.address), each.count, now_s - each.last_s)
            for reason, found in self._parts.driver.contacts.strangers().items()
            for each in found
            if each.address not in ours and now_s - each.last_s <= STRANGERS_S
        )


def counters_that_tell(parts: Parts) -> Counters:
    """The counters that health reads the recent growth of."""
    gossip, driver = parts.driver.core.statistics(), parts.driver.statistics
    return {
        "stalls": gossip.get("stalls", 0),
        "lost": driver.commands_lost + driver.stream_tasks_lost,
        "sent": driver.datagrams_sent,
        "send_errors": driver.send_errors,
        "disk_failures": parts.storage.statistics.failures,
    }
