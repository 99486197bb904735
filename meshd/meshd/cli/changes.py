"""What changed between two looks at the members. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from meshd.cli.render import duration, plain

if TYPE_CHECKING:
    from meshd_plugins.api import Value

Row = Mapping[str, "Value"]

FIELDS: Final = ("state", "epoch", "incarnation", "name", "address", "serves")
"""What is told of; round trips and loads move all the time."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference of one member; `was` is None for a member that appeared, `row` for one that went."""

    kind: str  # appeared, gone, or one of FIELDS
    was: Row | None
    row: Row | None

    def value(self) -> dict[str, Value]:
        """As a line of JSON."""
        who = self.row or self.was or {}
        value: dict[str, Value] = {
            "change": self.kind,
            "node": who.get("node"),
            "name": who.get("name"),
        }
        if self.kind in FIELDS and self.was is not None and self.row is not None:
            value |= {"from": self.was.get(self.kind), "to": self.row.get(self.kind)}
        return {**value, "peer": self.row}

    def text(self) -> str:
        """As a line for people."""
        was, row = self.was or {}, self.row or {}
        name = plain((self.row or was).get("name"))
        match self.kind:
            case "appeared":
                return (
                    f"{name}  {plain(row.get('state'))}  {plain(row.get('address'))}  "
                    f"since {duration(row.get('since_s'))}"
                )
            case "gone":
                return f"{name}  forgotten  was {plain(was.get('state'))}"
            case "state":
                lasted = duration(was.get("since_s"))
                return (
                    f"{name}  {plain(row.get('state'))}  was {plain(was.get('state'))} for {lasted}"
                )
            case "epoch":
                return f"{name}  restarted  epoch {plain(row.get('epoch'))}"
            case "incarnation":
                return f"{name}  spoke up for itself  incarnation {plain(row.get('incarnation'))}"
            case _:
                to = plain(row.get(self.kind))
                return f"{name}  {self.kind} {to}  was {plain(was.get(self.kind))}"


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """What to tell somebody who has seen `before`, member by member in the order of `after`."""
    old = {str(row.get("node")): row for row in before}
    new = {str(row.get("node")): row for row in after}
    found: list[Change] = []
    for node, row in new.items():
        found.extend(_of_member(old.get(node), row))
    found.extend(Change("gone", row, None) for node, row in old.items() if node not in new)
    return found


def _of_member(was: Row | None, row: Row) -> Iterator[Change]:
    if was is None:
        yield Change("appeared", None, row)
        return
    differing = [key for key in FIELDS if was.get(key) != row.get(key)]
    if "epoch" in differing and "incarnation" in differing:
        differing.remove("incarnation")  # a new life counts from 0
    for key in differing:
        yield Change(key, was, row)
