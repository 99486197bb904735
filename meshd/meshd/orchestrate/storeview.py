"""The store for people: what is held of whom, and how what a peer holds differs.

Two stores of a mesh in which something changes are never compared at one moment. A difference that is there
once is news on its way; one that is still there seconds later is what `lasting` finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshd.core.membership import MemberView
from meshd_cms import DigestLine, NodeId, Store, Version, node_id_text
from meshd_cms.entries import entry_size_bytes, read_value
from meshd_plugins.api import Value

_WHOLE_BYTES: Final = 1 << 30  # no record is as large: its bounds are in meshd_cms.types


@dataclass(frozen=True, slots=True)
class Difference:
    """What is held of one owner here and there; None: nothing. The two are not equal."""

    owner: NodeId
    here: DigestLine | None
    there: DigestLine | None

    @property
    def is_here_behind(self) -> bool:
        """Whether it is this node that lacks something, rather than the peer."""
        return progress(self.here) < progress(self.there)

    @property
    def reason(self) -> str:
        """Why they differ, for people."""
        here, there = self.here, self.there
        if here is None or there is None:
            return "not held"
        if here.epoch != there.epoch:
            return "an earlier life"
        versions = abs(here.max_version - there.max_version)
        if versions:
            return f"{versions} version{'s' if versions > 1 else ''} behind"
        return "tombstones not collected"


def progress(line: DigestLine | None) -> tuple[int, int, int]:
    """How far a record is; what the owner says later is further."""
    return (0, 0, 0) if line is None else (line.epoch, line.max_version, line.floor)


def differences(here: Iterable[DigestLine], there: Iterable[DigestLine]) -> tuple[Difference, ...]:
    """Where two stores differ, by owner."""
    ours = {line.owner: line for line in here}
    theirs = {line.owner: line for line in there}
    return tuple(
        Difference(owner, ours.get(owner), theirs.get(owner))
        for owner in sorted({**ours, **theirs})
        if progress(ours.get(owner)) != progress(theirs.get(owner))
    )


def lasting(before: Sequence[Difference], after: Sequence[Difference]) -> tuple[Difference, ...]:
    """Those of `before` that did not close: who was behind still lacks what the other had *then*.

    Somebody who is behind by newer news only, keeps up.
    """
    now = {difference.owner: difference for difference in after}
    found: list[Difference] = []
    for was in before:
        still = now.get(was.owner)
        if still is None or still.is_here_behind is not was.is_here_behind:
            continue
        behind = still.here if was.is_here_behind else still.there
        if progress(behind) < max(progress(was.here), progress(was.there)):
            found.append(still)
    return tuple(found)


def difference_value(
    difference: Difference, members: Mapping[NodeId, MemberView]
) -> dict[str, Value]:
    """One line of `meshd store diff`."""
    return {
        **_who(difference.owner, members),
        "behind": "here" if difference.is_here_behind else "there",
        "reason": difference.reason,
        "here": _line_value(difference.here),
        "there": _line_value(difference.there),
    }


def record_value(
    store: Store,
    owner: NodeId,
    members: Mapping[NodeId, MemberView],
    now_s: float,
    *,
    entries: bool,
) -> dict[str, Value]:
    """One record as it is held here; with `entries`, also its keys, values and tombstones."""
    line = store.line(owner)
    whole = store.delta_since(owner, Version(0), _WHOLE_BYTES)
    held = () if whole is None else whole.entries
    age_s = store.age_s(owner, now_s)
    value: dict[str, Value] = {
        **_who(owner, members),
        "epoch": None if line is None else int(line.epoch),
        "version": None if line is None else int(line.max_version),
        "floor": None if line is None else int(line.floor),
        "complete": whole is not None and whole.until == whole.head.max_version,
        "keys": sum(entry.value is not None for entry in held),
        "tombstones": sum(entry.value is None for entry in held),
        "size_bytes": sum(entry_size_bytes(entry) for entry in held),
        "age_s": None if age_s is None else round(age_s, 1),
    }
    if entries:
        value["entries"] = [
            {
                "key": entry.key,
                "version": int(entry.version),
                "size_bytes": entry_size_bytes(entry),
                "tombstone": entry.value is None,
                "value": None if entry.value is None else read_value(entry.value),
            }
            for entry in sorted(held, key=lambda entry: entry.key)
        ]
    return value


def _who(owner: NodeId, members: Mapping[NodeId, MemberView]) -> dict[str, Value]:
    view = members.get(owner)
    return {
        "node": node_id_text(owner),
        "name": "" if view is None else view.name,
        "state": "unlisted" if view is None else view.state.value,
    }


def _line_value(line: DigestLine | None) -> Value:
    if line is None:
        return None
    return {"epoch": int(line.epoch), "version": int(line.max_version), "floor": int(line.floor)}
