"""All checks over one snapshot, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from meshd.health import check_machine, check_mesh, check_network, check_trust
from meshd.health.facts import Facts
from meshd.health.findings import Finding, Severity

Check: TypeAlias = Callable[[Facts], Iterator[Finding]]

CHECKS: Final[tuple[Check, ...]] = (
    check_machine.daemon_down,
    check_machine.disk,
    check_machine.load,
    check_machine.workers,
    check_machine.plugins,
    check_machine.sending,
    check_machine.clock,
    check_trust.certificate,
    check_trust.keys,
    check_trust.mesh_clock,
    check_network.interfaces,
    check_network.multicast,
    check_network.mdns,
    check_network.lanes,
    check_mesh.peers,
    check_mesh.seeds,
    check_mesh.strangers,
    check_mesh.releases,
    check_mesh.doubles,
    check_mesh.offences,
    check_mesh.stores,
)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many findings of each severity."""

    errors: int
    warnings: int
    notes: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, the worst first; findings of one severity in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Severity:
        """NOTE when there is nothing worse, or nothing at all."""
        return max((finding.severity for finding in self.findings), default=Severity.NOTE)

    @property
    def tally(self) -> Tally:
        """How many of each."""
        counts = {
            severity: sum(finding.severity is severity for finding in self.findings)
            for severity in Severity
        }
        return Tally(counts[Severity.ERROR], counts[Severity.WARNING], counts[Severity.NOTE])


def examine(facts: Facts) -> Report:
    """Run every check."""
    found = [finding for check in CHECKS for finding in check(facts)]
    return Report(tuple(sorted(found, key=lambda finding: -finding.severity)))
