"""What is wrong with a node, its network and its mesh: facts in, findings out. Pure.

`facts` is a snapshot that somebody else took; `examine` reads it and names what it finds, each with a
stable code. Nothing here asks the system or the network anything, so every finding can be tested.
"""

from __future__ import annotations

from meshd.health.facts import (
    ClockFacts,
    DaemonFacts,
    DiskFacts,
    Facts,
    InterfaceFact,
    LoadFacts,
    MachineFacts,
    MdnsFacts,
    MulticastFact,
    PeerAnswer,
    PeerFact,
    PluginFact,
    SeedFact,
    StoreDifference,
    StrangerFact,
    Trouble,
    TroubleKind,
    TrustFacts,
    WorkerFact,
)
from meshd.health.findings import Code, Finding, Severity
from meshd.health.report import CHECKS, Report, Tally, examine

__all__ = [
    "CHECKS",
    "ClockFacts",
    "Code",
    "DaemonFacts",
    "DiskFacts",
    "Facts",
    "Finding",
    "InterfaceFact",
    "LoadFacts",
    "MachineFacts",
    "MdnsFacts",
    "MulticastFact",
    "PeerAnswer",
    "PeerFact",
    "PluginFact",
    "Report",
    "SeedFact",
    "Severity",
    "StoreDifference",
    "StrangerFact",
    "Tally",
    "Trouble",
    "TroubleKind",
    "TrustFacts",
    "WorkerFact",
    "examine",
]
