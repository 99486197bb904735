"""Lifeguard: how ill we are ourselves, and how long a suspect has.

Invariants: the local health score is in [0, local_health_max]; a suspicion's timeout never grows by a
confirmation, and nobody is dead before a silence as long as the death floor; a suspicion is bound to one (epoch, incarnation).
See Dadgar, Phillips, Currey, "Lifeguard: Local Health Awareness for More Accurate Failure Detection",
2018, section IV.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from meshd.core.config import GossipConfig
from meshd.core.membership import Update
from meshd.core.timers import Timer, Timers
from meshd_cms.types import NodeId


class LocalHealth:
    """0 is well; each point makes our probes that much slower, so that we accuse others later."""

    def __init__(self, score_max: int) -> None:
        self._score_max = score_max
        self._score = 0

    @property
    def score(self) -> int:
        """Points of ill health."""
        return self._score

    @property
    def factor(self) -> int:
        """By what probe interval and timeout are multiplied."""
        return self._score + 1

    def better(self) -> None:
        """A probe was answered."""
        self._score = max(0, self._score - 1)

    def worse(self, points: int = 1) -> None:
        """A nack is missing, we had to refute, or our own timers were late."""
        self._score = min(self._score_max, self._score + points)


@dataclass(frozen=True, slots=True)
class Size:
    """Of a mesh, as it bears on a suspicion."""

    nodes: int  # live members, the suspect and ourselves included
    able: int  # of them, who could accuse: ourselves and the alive, the suspect not included


def suspicion_timeout_s(
    config: GossipConfig,
    mesh: Size,
    confirmations: int,
    factor: int,
    silent_s: float = 0.0,
) -> float:
    """How long a suspicion lasts before it is death.

    Tmin = multiplier * max(1, log10 N) * T, where T is how long a probe lasts, Tmax = max_multiplier * Tmin, and with C confirmations of
    the K that can be had, t = max(Tmin, Tmax - (Tmax - Tmin) * ln(C + 1) / ln(K + 1)); K = 0, nobody there
    to confirm, gives Tmin. Only who is alive can confirm: after a partition, few can.

    Args:
        config: the knobs.
        mesh: its size.
        confirmations: distinct accusers beside the first.
        factor: our local health factor, >= 1.
        silent_s: for how long it has been silent already; the death floor counts from there.
    """
    interval_s = config.probe_deadline_s * min(factor, config.suspicion_health_max + 1)
    least_s = config.suspicion_multiplier * max(1.0, math.log10(max(1, mesh.nodes))) * interval_s
    most_s = config.suspicion_max_multiplier * least_s
    possible = min(
        config.suspicion_confirmations, mesh.able - 1
    )  # the first accuser confirms nothing
    if possible < 1:
        timeout_s = least_s
    else:
        gained = math.log(confirmations + 1) / math.log(possible + 1)
        timeout_s = max(least_s, most_s - (most_s - least_s) * gained)
    return max(timeout_s, config.death_floor_s - silent_s)


@dataclass(slots=True)
class _Suspicion:
    update: Update  # the suspicion: its epoch and incarnation are what may die
    timer: Timer
    timeout_s: float
    factor: int  # of our health when it began
    silent_s: float  # for how long it had been silent then
    confirmations: int = 0


class Suspicions:
    """The running suspicions; `expired` is called with the claim that was not refuted in time."""

    def __init__(
        self, config: GossipConfig, timers: Timers, expired: Callable[[Update], None]
    ) -> None:
        self._config = config
        self._timers = timers
        self._expired = expired
        self._running: dict[NodeId, _Suspicion] = {}

    def start(
        self, update: Update, mesh: Size, factor: int, now_s: float, silent_s: float = 0.0
    ) -> None:
        """A member is suspected, in this incarnation; a running suspicion of an older one ends."""
        self.stop(update.node)
        timeout_s = suspicion_timeout_s(self._config, mesh, 0, factor, silent_s)
        timer = self._timers.at(now_s + timeout_s, lambda: self._fire(update.node))
        self._running[update.node] = _Suspicion(update, timer, timeout_s, factor, silent_s)

    def confirm(self, node: NodeId, mesh: Size, confirmations: int, now_s: float) -> None:
        """So many others accuse it too."""
        one = self._running.get(node)
        if one is not None:
            one.confirmations = max(one.confirmations, confirmations)
            self._shorten(one, mesh, now_s)

    def refit(self, mesh: Size, now_s: float) -> None:
        """Somebody else is suspected now, or gone: fewer are left who could confirm anything."""
        for one in self._running.values():
            self._shorten(one, mesh, now_s)

    def _shorten(self, one: _Suspicion, mesh: Size, now_s: float) -> None:
        timeout_s = suspicion_timeout_s(
            self._config, mesh, one.confirmations, one.factor, one.silent_s
        )
        if timeout_s < one.timeout_s:
            began_s = one.timer.due_s - one.timeout_s
            one.timeout_s = timeout_s
            self._again(one, max(now_s, began_s + timeout_s))

    def hasten(self, node: NodeId, left_s: float, now_s: float) -> None:
        """There is hard evidence: it has at most this long left to refute."""
        one = self._running.get(node)
        if one is not None and one.timer.due_s > now_s + left_s:
            one.timeout_s -= one.timer.due_s - (now_s + left_s)
            self._again(one, now_s + left_s)

    def stop(self, node: NodeId) -> None:
        """Refuted, dead or gone."""
        one = self._running.pop(node, None)
        if one is not None:
            one.timer.cancel()

    def _again(self, one: _Suspicion, due_s: float) -> None:
        one.timer.cancel()
        one.timer = self._timers.at(due_s, lambda: self._fire(one.update.node))

    def _fire(self, node: NodeId) -> None:
        self._expired(self._running.pop(node).update)
