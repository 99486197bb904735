"""Counters as metric families, and their text."""

from __future__ import annotations

import re

from meshd.edge.look_api import exposition
from meshd.orchestrate.metrics import Family, families

STATUS = {
    "uptime_s": 12.5,
    "members": {"alive": 2, "dead": 1},
    "health": {"errors": 1, "warnings": 0, "notes": 0},
    "load_ages_s": {"a": 1.5, "b": 4.0, "c": None},
    "offences": {"pi": {"claims_forged": 2}, "nano": {"claims_forged": 3}},
    "counters": {
        "gossip": {"rumours_sent": 41, "members_live": 2},
        "datagrams": {"datagrams_sent": 5, "bytes_sent": 700, "send_errors": 1},
        "dropped": {"opened": 9, "other_mesh": 3},
        "streams": {"connections": 1, "dials": 4, "bytes_sent": 10},
        "storage": {"writes": 2, "failures": 0, "refusing": False, "last_error": "no"},
        "plugins": {"plugins_active": 2, "slow_calls": 0},
    },
}


def values(text: str) -> dict[str, str]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in (line.rpartition(" ") for line in lines)}


def test_every_figure_has_its_name_and_labels() -> None:
    told = values(exposition(families(STATUS)))
    assert told == {
        "meshd_process_up_seconds": "12.5",
        'meshd_members{state="alive"}': "2",
        'meshd_members{state="dead"}': "1",
        'meshd_health_findings{severity="errors"}': "1",
        'meshd_health_findings{severity="notes"}': "0",
        'meshd_health_findings{severity="warnings"}': "0",
        "meshd_loads_known": "2",
        "meshd_loads_age_max_seconds": "4",
        'meshd_gossip_events_total{event="rumours_sent"}': "41",
        "meshd_gossip_members_live": "2",
        'meshd_datagrams_total{direction="sent"}': "5",
        'meshd_datagrams_total{direction="received"}': "0",
        'meshd_datagrams_bytes_total{direction="sent"}': "700",
        'meshd_datagrams_bytes_total{direction="received"}': "0",
        'meshd_datagrams_troubles_total{kind="send_errors"}': "1",
        'meshd_datagrams_dropped_total{reason="other_mesh"}': "3",
        'meshd_offences_total{kind="claims_forged"}': "5",
        "meshd_streams_connections": "1",
        "meshd_streams_dials_total": "4",
        "meshd_streams_sent_bytes_total": "10",
        "meshd_storage_failures_total": "0",
        "meshd_storage_writes_total": "2",
        "meshd_plugins_active": "2",
        "meshd_plugins_slow_calls_total": "0",
    }


def test_nothing_that_a_peer_says_becomes_a_label() -> None:
    text = exposition(families(STATUS))
    assert "pi" not in re.findall(r'"([^"]*)"', text)
    assert "nano" not in text


def test_each_family_is_introduced_once_and_keeps_its_kind() -> None:
    lines = exposition(families(STATUS)).splitlines()
    kinds = [line.split()[2:] for line in lines if line.startswith("# TYPE")]
    assert len({name for name, _ in kinds}) == len(kinds)
    for name, kind in kinds:
        assert (kind == "counter") is name.endswith("_total")


def test_labels_and_figures_are_written_as_prometheus_reads_them() -> None:
    family = Family("m", "Help.", is_counter=False, samples=[({"a": 'x"\\\n'}, 1e15 + 0.5)])
    assert exposition([family]) == (
        '# HELP m Help.\n# TYPE m gauge\nm{a="x\\"\\\\\\n"} 1000000000000000.5\n'
    )


def test_a_daemon_that_says_nothing_gives_no_broken_metric() -> None:
    for family in families({}):
        assert family.samples
