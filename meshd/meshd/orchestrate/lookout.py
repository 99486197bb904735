"""What an operator looks at: status, metrics, the store here and at a peer, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Final

import trio

from meshd.core.frames import PROTOCOL_VERSION
from meshd.core.membership import MemberView
from meshd.health import Report
from meshd.orchestrate.examiner import Examiner
from meshd.orchestrate.inspection import (
    InspectionServer,
    Inspector,
    SelfDescription,
    own_lines,
)
from meshd.orchestrate.metrics import Family, families
from meshd.orchestrate.parts import Parts
from meshd.orchestrate.reporting import status_value
from meshd.orchestrate.storeview import difference_value, differences, record_value
from meshd_cms import NodeId, node_id_text
from meshd_plugins.api import BadRequest, Refused, Value

PREFIX_CHARS_MIN: Final = 4  # of an id; `meshd peers --wide` shows eight


class Lookout:
    """Reads one daemon for people.

    `inspections` answers what other nodes ask of this one; `incidents` is to be run and told of events.

    Args:
        parts: what is read.
        unix_s: the wall clock.
    """

    def __init__(self, parts: Parts, unix_s: Callable[[], float]) -> None:
        self._parts = parts
        self._inspector = Inspector(parts.me, parts.streams, unix_s)
        self._examiner = Examiner(parts, self._inspector, unix_s)
        self.incidents = self._examiner.incidents
        about = SelfDescription(
            software=parts.software,
            protocol=PROTOCOL_VERSION,
            unix_s=unix_s,
            up_s=lambda: trio.current_time() - parts.began_s,
            heard_ago_s=self._examiner.heard_ago_s,
        )
        self.inspections = InspectionServer(about, parts.store)

    def status(self) -> Mapping[str, Value]:
        """This node, counters included."""
        return status_value(self._parts, self._examiner.quick())

    def metrics(self) -> tuple[Family, ...]:
        """The same as metric families."""
        return families(self.status())

    def store(self, node: str) -> Mapping[str, Value]:
        """What is held here: of every owner in short, or of one node with its entries.

        Raises:
            Refused: `unknown_node`.
            BadRequest: `ambiguous_node`.
        """
        store, now_s = self._parts.store, trio.current_time()
        members = self._parts.members()
        owners = list(store.owners())
        if node:
            owners = [find_node(node, {**dict.fromkeys(owners), **members})]
        names = self._parts.names()
        owners.sort(key=lambda each: (names.get(each, ""), each))
        return {
            "records": [
                record_value(store, each, members, now_s, entries=bool(node)) for each in owners
            ]
        }

    async def store_diff(self, node: str) -> Mapping[str, Value]:
        """How what a peer holds differs from what is held here, asked of the peer itself.

        Raises:
            Refused: `unknown_node`.
            BadRequest: `ambiguous_node`, or `own_node`: it is this one.
            Failed: the peer did not answer, or not with what it should.
        """
        members = self._parts.members()
        peer = members[find_node(node, members)]
        if peer.is_self:
            raise BadRequest(f"{node} is this node: name another one", code="own_node")
        theirs = await self._inspector.lines(peer.node, peer.address)
        ours = own_lines(self._parts.store)
        members = self._parts.members()
        found = differences(ours, theirs)
        return {
            "node": node_id_text(peer.node),
            "name": peer.name,
            "records_here": len(ours),
            "records_there": len(theirs),
            "in_step": not found,
            "differences": [difference_value(difference, members) for difference in found],
        }

    async def doctor(self) -> Mapping[str, Value]:
        """What is wrong, the worst first."""
        return report_value(await self._examiner.full())


def report_value(report: Report) -> Mapping[str, Value]:
    """A report as `meshd doctor --json` prints it."""
    return {
        "worst": report.worst.word if report.findings else "none",
        "tally": asdict(report.tally),
        "findings": [
            {
                "code": finding.code.value,
                "severity": finding.severity.word,
                "says": finding.says,
                "do": finding.do,
            }
            for finding in report.findings
        ],
    }


def find_node(text: str, members: Mapping[NodeId, MemberView | None]) -> NodeId:
    """The member that a person means: by name, by id, or by the beginning of its id.

    Raises:
        Refused: `unknown_node`: there is none.
        BadRequest: `ambiguous_node`: there are several.
    """
    named = [node for node, view in members.items() if view is not None and view.name == text]
    if not named and len(text) >= PREFIX_CHARS_MIN:
        named = [node for node in members if node_id_text(node).startswith(text.lower())]
    if not named:
        raise Refused(f"there is no node {text!r}: `meshd peers` lists them", code="unknown_node")
    if len(named) > 1:
        ids = ", ".join(sorted(node_id_text(node) for node in named)[:4])
        raise BadRequest(f"{text!r} is several nodes: {ids}", code="ambiguous_node")
    return named[0]
