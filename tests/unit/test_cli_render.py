"""Tables, figures, and what must not reach a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.cli.render import (
    Column,
    cell_width,
    duration,
    facts,
    harmless,
    harmless_text,
    plain,
    size,
    table,
)

COLUMNS = (Column("name", "name"), Column("count", "n", right=True), Column("why", "why"))


def test_optional_columns_go_before_any_is_cut() -> None:
    columns = [Column("a", "a"), Column("b", "b", optional=True), Column("c", "c", optional=True)]
    rows = [{"a": "knowledge.gpt/general", "b": "chat", "c": "mesh"}]
    assert table(rows, columns, 33).splitlines()[0].split() == ["A", "B", "C"]
    assert table(rows, columns, 32).splitlines()[0].split() == ["A", "B"]
    assert table(rows, columns, 26).splitlines() == ["A", "knowledge.gpt/general"]
    assert table(rows, columns, 20).splitlines()[1].endswith("…")


def test_columns_are_aligned() -> None:
    rows = [{"name": "pi", "count": 7, "why": "near"}, {"name": "workshop", "count": 112}]
    assert table(rows, COLUMNS, 80).splitlines() == [
        "NAME        N  WHY",
        "pi          7  near",
        "workshop  112  -",
    ]


def test_the_widest_column_gives_way() -> None:
    text = table([{"name": "pi", "count": 1, "why": "x" * 100}], COLUMNS, 40)
    assert max(map(len, text.splitlines())) == 40
    assert text.endswith("…")
    assert "pi" in text


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries({"name": st.text(max_size=30), "why": st.text(max_size=60)}),
        max_size=6,
    ),
    width=st.integers(min_value=30, max_value=120),
)
def test_no_line_is_wider_than_the_terminal(rows: list[dict[str, str]], width: int) -> None:
    lines = table(rows, COLUMNS, width).split("\n")
    assert len(lines) == len(rows) + 1
    assert all(cell_width(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0021, "2.1 ms"),
        (0, "0 s"),
        (0.42, "0.42 s"),
        (2, "2 s"),
        (12.4, "12 s"),
        (190, "3 min"),
        (3725, "1 h 2 min"),
        (400_000, "5 d"),
        (None, "-"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_values_on_one_line() -> None:
    assert (
        plain({"cpu": 0.25, "free_bytes": 98_000_000, "age_s": 3})
        == "cpu 0.25, free 98 MB, age 3 s"
    )
    assert plain(["a", True, None]) == "a, yes, -"
    assert size(1_500) == "1.5 kB"
    assert (
        facts({"uptime_s": 61, "mesh": "home", "x": 1}, skip=("x",))
        == "uptime  1 min\nmesh    home"
    )


def test_escape_sequences_do_not_pass() -> None:
    evil = "\x1b]0;owned\x07\x1b[2Jpi\r\n\u202e"
    assert not set(harmless(evil)) & set("\x1b\x07\r\n\u202e")
    assert harmless_text("a\x1b[31m\tb\n\x9b") == "a[31m\tb\n"
    assert harmless_text("wörld — 日本\n") == "wörld — 日本\n"
