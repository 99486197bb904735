"""What authors of plugins read their tables with: the errors name the table, the key, the value and what would do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from meshd_plugins.api import PluginConfigError, Value
from meshd_plugins.tables import (
    read_boolean,
    read_choice,
    read_integer,
    read_number,
    reject_unknown,
)

WHERE = "plugins.dice"


def test_what_is_right_is_read_and_what_is_not_there_is_the_default() -> None:
    table: dict[str, Value] = {"fair": False, "sides": 20, "weight_g": 4, "colour": "red"}
    reject_unknown(table, ("fair", "sides", "weight_g", "colour"), WHERE)
    assert read_boolean(table, "fair", WHERE, default=True) is False
    assert read_boolean({}, "fair", WHERE, default=True) is True
    assert read_integer(table, "sides", WHERE, 2, 20, default=6) == 20
    assert read_integer({}, "sides", WHERE, 2, 20, default=6) == 6
    assert read_number(table, "weight_g", WHERE, 0.5, 9, default=1.5) == 4.0
    assert read_number({}, "weight_g", WHERE, 0.5, 9, default=1.5) == 1.5
    assert read_choice(table, "colour", WHERE, ("", "red"), default="") == "red"
    assert read_choice({}, "colour", WHERE, ("", "red"), default="") == ""


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (
            lambda t: reject_unknown(t, ("sides", "fair"), WHERE),
            "key 'side'; did you mean 'sides'?",
        ),
        (lambda t: reject_unknown(t, ("x", "y"), WHERE), "key 'side'; known are x, y"),
        (lambda t: read_boolean(t, "side", WHERE, default=True), "side is '7': true or false"),
        (
            lambda t: read_integer(t, "side", WHERE, 2, 20, default=6),
            "side is '7': an integer from 2 to 20",
        ),
        (
            lambda t: read_number(t, "side", WHERE, 0.5, 20, default=6),
            "side is '7': a number from 0.5 to 20",
        ),
        (lambda t: read_choice(t, "side", WHERE, ("", "a", "b"), default="a"), "one of a, b"),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(
    read: Callable[[dict[str, Value]], object], said: str
) -> None:
    with pytest.raises(PluginConfigError) as caught:
        read({"side": "7"})
    assert str(caught.value).startswith(WHERE)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [True, 1, 21, 2.0, float("nan"), None, "6"])
def test_a_number_out_of_bounds_or_of_another_kind_is_not_read(value: Value) -> None:
    with pytest.raises(PluginConfigError):
        read_integer({"sides": value}, "sides", WHERE, 2, 20, default=6)
    if value != 2.0:
        with pytest.raises(PluginConfigError):
            read_number({"sides": value}, "sides", WHERE, 2, 20, default=6)
