"""From where and when datagrams came: what `meshd peers` and `meshd doctor` tell of them.

Both tables are bounded, and what was heard longest ago gives way: a flood of forged sources costs the
memory of one full table and no more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from meshd.core.effects import Address
from meshd.core.sealing import DropReason
from meshd_cms import NodeId

HEARD_MAX: Final = 4096
STRANGERS_MAX: Final = 32  # sources kept for each reason

TELLING: Final = (
    DropReason.OTHER_MESH,
    DropReason.OWN,
    DropReason.BAD_SEAL,
    DropReason.WRONG_FORMAT,
)
"""The reasons whose sources a person may want to look for."""


@dataclass(frozen=True, slots=True)
class Stranger:
    """A source whose datagrams are dropped."""

    reason: DropReason
    address: Address
    count: int
    last_s: float  # monotonic


class Contacts:
    """Who was heard, and who was turned away. Owned by the driver's task."""

    def __init__(self) -> None:
        self._heard: OrderedDict[NodeId, float] = OrderedDict()
        self._strangers: dict[DropReason, OrderedDict[Address, Stranger]] = {
            reason: OrderedDict() for reason in TELLING
        }

    def heard(self, node: NodeId, now_s: float) -> None:
        """An authentic datagram of a node arrived."""
        self._heard[node] = now_s
        self._heard.move_to_end(node)
        if len(self._heard) > HEARD_MAX:
            self._heard.popitem(last=False)

    def dropped(self, reason: DropReason, source: Address, now_s: float) -> None:
        """A datagram was turned away; only the reasons in `TELLING` are remembered."""
        table = self._strangers.get(reason)
        if table is None:
            return
        known = table.pop(source, None)
        table[source] = Stranger(reason, source, 1 if known is None else known.count + 1, now_s)
        if len(table) > STRANGERS_MAX:
            table.popitem(last=False)

    def heard_s(self, node: NodeId) -> float | None:
        """When the last datagram of a node arrived, monotonic; None when none did."""
        return self._heard.get(node)

    def strangers(self) -> Mapping[DropReason, tuple[Stranger, ...]]:
        """Who was turned away, by reason, the latest last."""
        return {reason: tuple(table.values()) for reason, table in self._strangers.items()}
