"""What `meshd peers --watch` tells and draws, without a daemon."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshd.cli.changes import FIELDS, changes
from meshd.cli.peers import frame
from meshd.cli.render import Column

COLUMNS = (Column("name", "node"), Column("state", "state"))


def row(node: str, **fields: Any) -> dict[str, Any]:
    return {
        "node": node,
        "name": node,
        "state": "alive",
        "since_s": 12.0,
        "address": "192.0.2.1:7946",
        "epoch": 7,
        "incarnation": 0,
        "serves": [],
        "round_trip_ms": 1.0,
        "load": {"cpu": 0.5},
        **fields,
    }


def test_the_first_look_shows_everybody() -> None:
    found = changes([], [row("a"), row("b", state="dead")])
    assert [change.text() for change in found] == [
        "a  alive  192.0.2.1:7946  since 12 s",
        "b  dead  192.0.2.1:7946  since 12 s",
    ]


def test_what_moves_all_the_time_is_no_change() -> None:
    after = row("a", round_trip_ms=3.0, load={"cpu": 1.0}, since_s=99.0, load_age_s=4.0)
    assert changes([row("a")], [after]) == []


@pytest.mark.parametrize(
    ("after", "text"),
    [
        ({"state": "suspect", "since_s": 0.1}, "a  suspect  was alive for 12 s"),
        ({"epoch": 8}, "a  restarted  epoch 8"),
        ({"incarnation": 1}, "a  spoke up for itself  incarnation 1"),
        ({"epoch": 8, "incarnation": 3}, "a  restarted  epoch 8"),
        ({"address": "192.0.2.2:7946"}, "a  address 192.0.2.2:7946  was 192.0.2.1:7946"),
        ({"serves": ["data.gpt/x"]}, "a  serves data.gpt/x  was -"),
    ],
)
def test_changes_read_as_sentences(after: dict[str, Any], text: str) -> None:
    [change] = changes([row("a")], [row("a", **after)])
    assert change.text() == text


def test_a_name_that_changes_is_told_by_id() -> None:
    [change] = changes([row("a")], [row("a", name="b")])
    assert change.text() == "b  name b  was a"


def test_who_is_forgotten_is_told_last() -> None:
    found = changes([row("a"), row("b", state="dead")], [row("c"), row("a")])
    assert [change.text() for change in found] == [
        "c  alive  192.0.2.1:7946  since 12 s",
        "b  forgotten  was dead",
    ]


@pytest.mark.parametrize("field", FIELDS)
def test_json_has_what_was_and_what_is(field: str) -> None:
    [change] = changes([row("a")], [row("a", **{field: "new"})])
    told = json.loads(json.dumps(change.value()))
    assert (told["change"], told["node"], told["to"]) == (field, "a", "new")
    assert told["from"] == row("a")[field]
    assert told["peer"]["name"]


def test_a_frame_counts_states_and_fits_the_terminal() -> None:
    rows = [row(f"node{i}", state="dead" if i == 3 else "alive") for i in range(50)]
    lines = frame(rows, COLUMNS, 40, 12, "")
    assert lines[0] == "50 members: 49 alive, 1 dead"
    assert len(lines) == 11
    assert lines[-1].startswith("and 42 more")
    assert max(map(len, lines[:-1])) <= 40


def test_nobody_is_hidden_where_there_is_room() -> None:
    lines = frame([row("a"), row("b")], COLUMNS, 80, 24, "the daemon is back")
    assert lines[0] == "2 members: 2 alive  (the daemon is back)"
    assert [line.split()[0] for line in lines[1:]] == ["NODE", "a", "b"]


def test_a_name_from_elsewhere_drives_no_terminal() -> None:
    lines = frame([row("a", name="\x1b[2Jboo")], COLUMNS, 80, 24, "\x1b[0m")
    assert "\x1b" not in "".join(lines)
