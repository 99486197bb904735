"""`meshd status`: this node in one plain value, counters included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import trio

from meshd import __version__
from meshd.core.membership import MemberState
from meshd.health import Tally
from meshd.orchestrate.parts import Parts, at
from meshd.orchestrate.records import load_for_people
from meshd.shell.supervisor import WorkerStatus
from meshd_cms import NodeId, node_id_short, node_id_text
from meshd_plugins.api import Value


def status_value(parts: Parts, tally: Tally) -> Mapping[str, Value]:
    """This node: identity, mesh, health, members by state, load, discovery, workers, counters.

    Args:
        parts: what is read.
        tally: what the checks found that need no asking around.
    """
    members = parts.members()
    states = {
        state.value: sum(view.state is state for view in members.values()) for state in MemberState
    }
    return {
        "node": node_id_text(parts.me),
        "name": parts.config.node.name,
        "mesh": parts.identity.mesh_name,
        "mesh_id": parts.identity.mesh_id.hex(),
        "version": __version__,
        "epoch": int(parts.store.epoch),
        "address": at(parts.address()),
        "http": parts.http,
        "uptime_s": round(trio.current_time() - parts.began_s, 1),
        "members": states,
        "health": asdict(tally),
        "trust": parts.trust.brief(),
        "capabilities": [descriptor.id for descriptor in parts.host.descriptors()],
        "load": load_for_people(parts.announcer.load()),
        "load_ages_s": _load_ages(parts),
        "discovery": _discovery(parts),
        "workers": [worker_value(worker) for worker in parts.supervisor.statistics()],
        "offences": offences_value(parts),
        "counters": _counters(parts),
    }


def worker_value(worker: WorkerStatus) -> dict[str, Value]:
    """One worker process, and what holds of its isolation."""
    isolation = worker.isolation
    return {
        "name": worker.name,
        "pid": worker.pid,
        "ready": worker.ready,
        "open_calls": worker.open_calls,
        "resident_bytes": worker.resident_bytes,
        "isolation": {
            "applied": isolation.applied,
            "steps": dict(isolation.steps),
            "missing": list(isolation.missing),
        },
    }


def offences_value(parts: Parts) -> dict[str, Mapping[str, int]]:
    """Who misbehaved: kinds and how often, by name; a name that two nodes carry has the id with it."""
    names = parts.names()
    value: dict[str, Mapping[str, int]] = {}
    for node, kinds in parts.driver.core.offences().items():
        name = label(node, names)
        value[f"{name} ({node_id_short(node)})" if name in value else name] = dict(kinds)
    return value


def label(node: NodeId, names: Mapping[NodeId, str]) -> str:
    """A node as people know it: by name, or by the beginning of its id."""
    return names.get(node) or node_id_short(node)


def _load_ages(parts: Parts) -> dict[str, Value]:
    """How old the load of each live peer is that we know, by id; null: none is known."""
    return {
        node_id_text(node): None if age_s is None else round(age_s, 1)
        for node, view in parts.members().items()
        if view.state.is_live and not view.is_self
        for age_s in (parts.catalogue.load_age_of(node),)
    }


def _discovery(parts: Parts) -> Mapping[str, Value]:
    config, seen = parts.config.discovery, parts.discovery.statistics
    return {
        "mdns": config.mdns,
        "mdns_registered": seen.registered,
        "mdns_found": sorted(at(address) for address in parts.discovered.mdns),
        "mdns_error": seen.last_error,
        "other_mesh": seen.other_mesh,
        "other_mesh_addresses": list(parts.discovery.strangers),
        "seeds": list(config.seeds),
        "remembered": [at(address) for address in parts.discovered.remembered],
    }


def _counters(parts: Parts) -> Mapping[str, Value]:
    return {
        "gossip": dict(parts.driver.core.statistics()),
        "datagrams": asdict(parts.driver.statistics),
        "dropped": dict(parts.opener.statistics()),
        "streams": asdict(parts.streams.statistics),
        "routing": asdict(parts.router.statistics),
        "prefixes": asdict(parts.handoff),
        "storage": asdict(parts.storage.statistics),
        "audit": asdict(parts.audit.statistics),
        "plugins": dict(parts.plugin_statistics()),
        "discovery": {
            name: count
            for name, count in asdict(parts.discovery.statistics).items()
            if type(count) is int
        },
    }
