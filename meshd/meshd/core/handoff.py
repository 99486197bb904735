"""Whether to fetch the KV state of a prefix from a peer or to compute it again. Pure.

Invariant: a fetch is begun only if it is expected to take less than the prefill it replaces by the factor
`advantage`, and is given up once it is seen that it will not. So what a wrong guess about a link can cost
is bounded: `trial_share` of the prefill, or the deadline if the link stops later on.

How fast a link is, is learnt from fetches alone, given-up ones included: from the question to the last byte's
import, so that the work of both ends is in it. A link that was never tried is guessed from its round trip,
optimistically, as the trial is short; what was learnt counts for `remembered_s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshd_cms.types import NodeId

LINKS_MAX: Final = 1_024


class Reason(StrEnum):
    """Why a prefix was not fetched, or not to its end. Labels a metric."""

    TOO_SHORT = "too_short"  # too few tokens beyond those that are warm here
    UNMEASURED = "unmeasured"  # no prefill rate or no size of a token is known
    SLOW_LINK = "slow_link"  # expected, or seen, to take longer than it may
    BUSY = "busy"  # enough fetches run here
    OFF = "off"  # this node fetches nothing
    PRIVACY = "privacy"  # its class forbids it
    NOT_THERE = "not_there"  # that peer is no member, or offers no such model
    REFUSED = "refused"  # the peer, or the capability here, did not want to
    MALFORMED = "malformed"  # what came is not what it should be
    CORRUPT = "corrupt"  # what came is not what its head says
    TIMEOUT = "timeout"
    LOST = "lost"  # the connection broke, or none came about
    BROKEN = "broken"  # the capability here broke on it


@dataclass(frozen=True, slots=True)
class HandoffConfig:
    """Knobs of the choice."""

    enable: bool = True  # False: this node neither fetches nor hands out
    tokens_min: int = 256  # fewer are computed. Up: fewer fetches, of less use each
    advantage: float = 1.5  # times that a fetch must be faster than the prefill. Up: fewer, surer
    trial_share: float = (
        0.1  # of the prefill, after which a slow fetch is given up. Up: tries longer
    )
    trial_s_min: float = 0.05
    silence_trials: float = 3.0  # times the trial without a byte, after which it is given up too
    silence_s_min: float = 1.0  # Up: waits longer for a worker in the middle of a long step
    deadline_s_max: float = (
        15.0  # of a fetch. Up: larger states; the node that asked hears nothing meanwhile
    )
    overhead_s: float = 0.02  # of a fetch of nothing: calls, copies, the worker's next step
    near_s: float = 0.004  # a round trip from which a link is guessed to be slower than wired
    near_bytes_per_s: float = 60e6  # guessed of a link that is nearer: half of 1 Gb/s
    remembered_s: float = 600.0  # Up: a link that got better is tried later
    size_slack: float = 1.25  # times the expected bytes that are taken. Up: more memory at risk
    bytes_max: int = 1 << 30  # of one state
    taken_s_max: float = 10.0  # that a piece which is handed out waits for who asked for it
    given_s_max: float = (
        60.0  # of handing one out. Up: for slower links; its memory is held so long
    )


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is known when the choice is made."""

    tokens: int  # of the state
    tokens_here: int  # of the same prompt that are warm here
    bytes_per_token: int  # 0: not known
    prefill_tokens_per_s: float  # 0.0: not measured
    link_bytes_per_s: float
    round_trip_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Fetch it, within these bounds."""

    bytes_max: int
    deadline_s: float  # from the question to the end of the import
    trial_s: float  # after which its pace is looked at
    silence_s: float  # without a byte, or without one being taken, after which it is given up
    expected_s: float


def choose(prospect: Prospect, config: HandoffConfig) -> Plan | Reason:
    """Fetch it within bounds, or the reason to compute it."""
    gained = prospect.tokens - prospect.tokens_here
    if gained < config.tokens_min:
        return Reason.TOO_SHORT
    if prospect.prefill_tokens_per_s <= 0.0 or prospect.bytes_per_token <= 0:
        return Reason.UNMEASURED
    prefill_s = gained / prospect.prefill_tokens_per_s
    size_bytes = prospect.tokens * prospect.bytes_per_token
    if size_bytes * config.size_slack > config.bytes_max:
        return Reason.SLOW_LINK
    carried_s = size_bytes / max(1.0, prospect.link_bytes_per_s)
    expected_s = config.overhead_s + 2 * prospect.round_trip_s + carried_s
    deadline_s = min(prefill_s / config.advantage, config.deadline_s_max)
    if expected_s >= deadline_s:
        return Reason.SLOW_LINK
    trial_s = max(config.trial_s_min, min(prefill_s, deadline_s) * config.trial_share)
    return Plan(
        bytes_max=int(size_bytes * config.size_slack) + 65_536,
        deadline_s=deadline_s,
        trial_s=trial_s,
        silence_s=max(config.silence_s_min, trial_s * config.silence_trials),
        expected_s=expected_s,
    )


def is_too_slow(plan: Plan, whole_bytes: int, bytes_so_far: int, took_s: float) -> bool:
    """Whether a fetch should be given up, by the pace at which its bytes came."""
    if took_s < plan.trial_s or bytes_so_far >= whole_bytes:
        return took_s > plan.deadline_s
    return bytes_so_far == 0 or took_s * whole_bytes / bytes_so_far > plan.deadline_s


class Links:
    """How fast peers hand over, as far as it was seen."""

    def __init__(self, config: HandoffConfig) -> None:
        self._config = config
        self._seen: dict[NodeId, tuple[float, float]] = {}  # bytes/s, when

    def bytes_per_s(self, node: NodeId, round_trip_s: float | None, now_s: float) -> float:
        """Seen within `remembered_s`, or guessed from the round trip."""
        config = self._config
        rate, at_s = self._seen.get(node, (0.0, 0.0))
        if rate and now_s - at_s <= config.remembered_s:
            return rate
        return self.guess(round_trip_s)

    def guess(self, round_trip_s: float | None) -> float:
        """Bytes/s of a link that was not tried, or is another node's."""
        config = self._config
        away_s = config.near_s * 4 if round_trip_s is None else max(round_trip_s, config.near_s)
        return config.near_bytes_per_s * config.near_s / away_s

    def note(self, node: NodeId, bytes_carried: int, took_s: float, now_s: float) -> None:
        """A fetch ended, or was given up: the last counts as much as all before it."""
        if bytes_carried <= 0 or took_s <= 0.0:
            return
        rate = bytes_carried / took_s
        before, at_s = self._seen.pop(node, (0.0, 0.0))
        if before and now_s - at_s <= self._config.remembered_s:
            rate = (before + rate) / 2.0
        if len(self._seen) >= LINKS_MAX:
            del self._seen[next(iter(self._seen))]
        self._seen[node] = (rate, now_s)
