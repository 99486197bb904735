"""Which candidate gets the request: an order of candidates by expected time, or by another policy.

The resolver says who may serve and in which class (exact, ancestor, general, cloud); the scheduler says in
which order to ask them. A lower class is asked only when every candidate of the higher ones is believed
full or failing. Full and failing ones are kept, at the end: belief may be wrong, and a refusal is cheap.

Known load is old. Eight entry points that all send to the peer that looked idle five seconds ago bury it
(a herd), so `expected_time` does three things (decision 0008): it counts what this node itself has begun
and finished since the load was sampled; it fades what was sampled towards the mean of all candidates as
it ages; and it draws the order at random among times that the age makes indistinguishable.

Nothing here reads a clock or a global generator: the same inputs and seed give the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import exp, log
from random import Random
from typing import NamedTuple, Protocol, TypeAlias

from meshd_cms.types import NodeId
from meshd_naming.offers import Offer
from meshd_naming.resolver import Candidate
from meshd_plugins.api import Rates

Key: TypeAlias = tuple[NodeId, str]
"""(owner, capability id)."""

KEYS_MAX = 4096  # peers' capabilities with a remembered failure or request
RECENT_MAX = 256  # finished requests remembered for one key
RATE_FLOOR_TOKENS_PER_S = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """What a peer last said of one capability."""

    busy: int  # slots
    queued: int = 0  # requests that wait
    queue_max: int = 0  # requests that may wait
    held_s: float = 0.0  # that a request holds a slot there, as it measured; 0.0: not known
    age_s: float = 0.0  # since it was sampled


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request is expected to take."""

    prompt_tokens: int = 64
    answer_tokens: int = 128  # 0: the answer is no text, as of embeddings


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Knobs of the cost. The defaults are for a LAN of small devices."""

    load_trust_s: float = (
        4.0  # s in which a load sample loses 63 % of its meaning; about the length of a
    )
    # request. Up: believes old load longer, herds more
    stale_spread: float = (
        0.5  # random stretch of a cost with no trusted load, as a share. Up: spreads more,
    )
    # uses fast peers less
    first_token_weight: float = (
        1.0  # cost of a second before the first token, on top of the completion.
    )
    # Up: prefers idle and near peers to fast ones
    failure_penalty_s: float = (
        5.0  # s added to the cost after one failure. Up: avoids a flaky peer more
    )
    failure_memory_s: float = (
        20.0  # s in which a failure loses 63 % of its weight. Up: avoids it longer
    )
    failing_score: float = (
        2.5  # remembered failures from which a peer counts as failing. Up: tries longer
    )
    default_decode_tokens_per_s: float = (
        5.0  # for a model that was not measured. Up: tries it sooner
    )
    default_prefill_tokens_per_s: float = 50.0  # the same, for its prompt
    default_service_s: float = (
        0.02  # for what has no tokens (a calculator). Up: avoids it when busy
    )
    default_round_trip_s: float = 0.005  # for a peer whose link was not measured. Up: prefers local


class HeadStart(NamedTuple):
    """What need not be computed of a request's prompt at one candidate."""

    warm_tokens: int = 0  # whose KV state is there, as far as is known
    fetched_tokens: int = 0  # whose state could be fetched from another node instead
    fetch_s: float = 0.0  # that this is expected to take


NO_HEAD_START = HeadStart()


class View(NamedTuple):
    """One candidate with all that is known about it at this moment. Made by the hundred, so a tuple."""

    candidate: Candidate
    load: Load | None  # None: never heard
    in_flight: int = 0  # requests of this node that run there now
    since_sample: int = 0  # own begun less own finished since the load was sampled; may be negative
    round_trip_s: float | None = None  # 0.0 when local; None: not measured
    failures: float = 0.0  # remembered, decaying
    head_start: HeadStart = NO_HEAD_START

    @property
    def occupied(self) -> int:
        """Requests believed to be there, running and waiting: sampled, corrected by our own since."""
        if self.load is None:
            return self.in_flight
        return max(self.in_flight, self.load.busy + self.load.queued + self.since_sample)

    @property
    def full(self) -> bool:
        """Whether one more would be refused, as far as is known.

        Believed however old the load is: forgetting it after 6 s loses a fifth more requests at 30 s
        between samples (decision 0008).
        """
        queue_max = self.load.queue_max if self.load is not None else 0
        return self.occupied >= self.candidate.offer.slots + queue_max


class Ranked(NamedTuple):
    """A view with what a policy expects of it; times are 0.0 for policies that expect nothing."""

    view: View
    first_s: float = 0.0  # to the first token
    total_s: float = 0.0  # to the end


class Choice(NamedTuple):
    """One place in the order."""

    candidate: Candidate
    view: View
    policy: str
    first_s: float
    total_s: float
    last_resort: bool  # believed full or failing

    @property
    def reason(self) -> str:
        """Why it stands where it stands, for people."""
        view, slots = self.view, self.candidate.offer.slots
        expected = (
            f"expected {self.total_s:.2f} s, first token {self.first_s:.2f} s; "
            if self.total_s > 0.0
            else ""
        )
        load = view.load
        known = f"known {load.age_s:.1f} s ago" if load else "load not known"
        failures = f"; {view.failures:.1f} recent failures" if view.failures >= 0.1 else ""
        resort = "; believed full" if view.full else ""
        head_start = view.head_start
        warm = f"; warm: {head_start.warm_tokens} tokens" if head_start.warm_tokens else ""
        if head_start.fetched_tokens:
            warm += f"; could fetch {head_start.fetched_tokens} in {head_start.fetch_s:.2f} s"
        return (
            f"{self.policy}: {expected}{view.occupied} of {slots} slots taken, {known}, "
            f"{view.in_flight} of ours{warm}{failures}{resort}; {self.candidate.reason}"
        )


class Policy(Protocol):
    """An order of the candidates of one class. Built-in and outside policies are the same thing."""

    @property
    def name(self) -> str:
        """For reasons and configuration."""
        ...

    def order(self, views: Sequence[View], demand: Demand, rng: Random) -> list[Ranked]:
        """Every view once, best first. Ties are broken with `rng` and nothing else."""
        ...


@dataclass(frozen=True, slots=True)
class RandomPolicy:
    """Any order."""

    name: str = "random"

    def order(self, views: Sequence[View], demand: Demand, rng: Random) -> list[Ranked]:  # noqa: ARG002 (the protocol's)
        """Shuffled."""
        return [Ranked(view) for view in rng.sample(views, len(views))]


@dataclass(frozen=True, slots=True)
class WeightedPolicy:
    """Random in proportion to capacity (slots times decode rate), blind to load."""

    name: str = "weighted"

    def order(self, views: Sequence[View], demand: Demand, rng: Random) -> list[Ranked]:  # noqa: ARG002
        """A draw without replacement (Efraimidis and Spirakis 2006, exponential keys)."""
        keyed = [(-log(1.0 - rng.random()) / view.candidate.weight, view) for view in views]
        return [Ranked(view) for _, view in sorted(keyed, key=lambda pair: pair[0])]


@dataclass(frozen=True, slots=True)
class LoadAwarePolicy:
    """Least utilised first, as sampled: what most gateways do, and what herds when load is stale."""

    name: str = "load_aware"

    def order(self, views: Sequence[View], demand: Demand, rng: Random) -> list[Ranked]:  # noqa: ARG002
        """By sampled utilisation, then by capacity."""
        return [Ranked(view) for view in _sorted(views, _sampled_utilisation, rng)]


@dataclass(frozen=True, slots=True)
class TwoChoicesPolicy:
    """Two at random, the less utilised of them first; then the same among the rest."""

    name: str = "p2c"

    def order(self, views: Sequence[View], demand: Demand, rng: Random) -> list[Ranked]:  # noqa: ARG002
        """Power of two choices (Mitzenmacher 2001), with our own requests counted."""
        left = rng.sample(views, len(views))
        ordered: list[Ranked] = []
        while left:
            place = 1 if len(left) > 1 and _utilisation(left[1]) < _utilisation(left[0]) else 0
            ordered.append(Ranked(left.pop(place)))
            rng.shuffle(left)
        return ordered


@dataclass(frozen=True, slots=True)
class ExpectedTimePolicy:
    """The default: least expected time to first token and completion, honest about stale load."""

    config: SchedulerConfig = SchedulerConfig()
    name: str = "expected_time"

    def order(self, views: Sequence[View], demand: Demand, rng: Random) -> list[Ranked]:
        """By cost, stretched at random as far as the load is stale."""
        usual = _mean_utilisation(views)
        costs: list[tuple[float, float, Ranked]] = []
        for view in views:
            trust = self._trust(view)
            ranked = self._expect(view, demand, trust, usual)
            stretch = 1.0 + (1.0 - trust) * self.config.stale_spread * rng.random()
            cost = ranked.total_s + self.config.first_token_weight * ranked.first_s
            cost += self.config.failure_penalty_s * view.failures
            costs.append((cost * stretch, rng.random(), ranked))
        costs.sort(key=lambda cost: cost[:2])
        return [ranked for _, _, ranked in costs]

    def _trust(self, view: View) -> float:
        """1.0 for a load sampled now, falling towards 0.0 with its age; 0.0 when never heard."""
        if view.candidate.local:
            return 1.0
        return exp(-max(0.0, view.load.age_s) / self.config.load_trust_s) if view.load else 0.0

    def _expect(self, view: View, demand: Demand, trust: float, usual: float) -> Ranked:
        config, offer, load = self.config, view.candidate.offer, view.load
        taken = view.in_flight + (1.0 - trust) * usual * max(0, offer.slots - view.in_flight)
        if load is not None:
            taken = max(view.in_flight, trust * view.occupied + (1.0 - trust) * taken)
        rates = offer.rates
        if rates is None and offer.value("family") is not None:
            rates = Rates()  # a model whose pace nobody has measured yet
        if rates is None:
            prefill_s = computed_s = 0.0
            decode_s = config.default_service_s
        else:
            prefill = rates.prefill_tokens_per_s or config.default_prefill_tokens_per_s
            token_s = 1.0 / max(RATE_FLOOR_TOKENS_PER_S, prefill)
            if not demand.answer_tokens:  # texts of all requests there share the batches
                token_s *= 1.0 + taken
            computed_s = demand.prompt_tokens * token_s
            prefill_s = _prefill_s(demand.prompt_tokens, token_s, view.head_start)
            decode_s = demand.answer_tokens / self._decode(rates, min(taken + 1.0, offer.slots))
        ahead = max(0.0, taken + 1.0 - offer.slots)  # that must end before this one starts
        # Those are believed to take as long as others took there. Where nothing is known of that: as long as
        # this one would cold, since what is warm for it is not for them.
        held_s = load.held_s if load is not None and load.held_s else computed_s + decode_s
        wait_s = ahead * held_s / offer.slots
        link_s = 0.0 if view.candidate.local else config.default_round_trip_s
        if view.round_trip_s is not None:
            link_s = view.round_trip_s
        first_s = link_s + wait_s + prefill_s + loading_s(offer)
        return Ranked(view, first_s, first_s + decode_s)

    def _decode(self, rates: Rates, together: float) -> float:
        """Tokens/s of one sequence of `together`, from the nearest measured batch that is no smaller."""
        alone = rates.decode_tokens_per_s or self.config.default_decode_tokens_per_s
        for size in sorted(rates.decode_tokens_per_s_by_batch):
            if size >= together:
                total = rates.decode_tokens_per_s_by_batch[size]
                return max(RATE_FLOOR_TOKENS_PER_S, min(alone, total / size))
        return max(RATE_FLOOR_TOKENS_PER_S, alone)


POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        ExpectedTimePolicy(),
        LoadAwarePolicy(),
        RandomPolicy(),
        TwoChoicesPolicy(),
        WeightedPolicy(),
    )
}
"""The built-in policies by name, with default knobs."""


def _prefill_s(prompt_tokens: int, token_s: float, head_start: HeadStart) -> float:
    """Until the prompt's state is there: computed from what is warm on, or fetched if that is sooner."""
    here_s = max(0, prompt_tokens - head_start.warm_tokens) * token_s
    if not head_start.fetched_tokens:
        return here_s
    rest_s = max(0, prompt_tokens - head_start.fetched_tokens) * token_s
    return min(here_s, head_start.fetch_s + rest_s)


def loading_s(offer: Offer) -> float:
    """Seconds until a model that is not in memory can begin; 0.0 for one that is, and for all else."""
    if offer.rates is None or offer.fields.get("resident") is not False:
        return 0.0
    return offer.rates.load_s


class InFlight:
    """Own requests by where they run, and those lately finished: what a load sample cannot know yet."""

    def __init__(self) -> None:
        self._keys: dict[int, Key] = {}
        self._running: dict[Key, dict[int, float]] = {}  # token to begun at; never empty
        self._finished: dict[
            Key, deque[tuple[float, float]]
        ] = {}  # (begun, finished), oldest first
        self._next = 0

    def begin(self, key: Key, now_s: float) -> int:
        """A request was sent; returns the token that `finish` wants."""
        self._next += 1
        self._keys[self._next] = key
        self._running.setdefault(key, {})[self._next] = now_s
        return self._next

    def finish(self, token: int, now_s: float) -> None:
        """It ended, however. A token is finished once."""
        key = self._keys.pop(token)
        running = self._running[key]
        begun_s = running.pop(token)
        if not running:
            del self._running[key]
        if key not in self._finished and len(self._finished) >= KEYS_MAX:
            del self._finished[next(iter(self._finished))]
        self._finished.setdefault(key, deque(maxlen=RECENT_MAX)).append((begun_s, now_s))

    def count(self, key: Key) -> int:
        """Own requests that run there now."""
        return len(self._running.get(key, ()))

    def since(self, key: Key, sampled_s: float) -> int:
        """Own requests begun after `sampled_s` and not finished, less those begun before, finished after."""
        running, finished = self._running.get(key), self._finished.get(key)
        begun = sum(1 for at_s in running.values() if at_s > sampled_s) if running else 0
        ended = 0
        for begun_s, ended_s in reversed(finished or ()):
            if ended_s <= sampled_s:
                break
            ended += begun_s <= sampled_s
        return begun - ended


class PeerHealth:
    """Failures by where they happened, forgotten exponentially."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._memory_s = config.failure_memory_s
        self._scores: dict[Key, tuple[float, float]] = {}  # score at a time

    def failed(self, key: Key, now_s: float, weight: float = 1.0) -> None:
        """It broke, hung, or could not be reached. A refusal is no failure: it is load."""
        score = self.score(key, now_s) + weight
        self._scores.pop(key, None)
        if len(self._scores) >= KEYS_MAX:
            del self._scores[next(iter(self._scores))]
        self._scores[key] = (score, now_s)

    def succeeded(self, key: Key, now_s: float) -> None:
        """It served: half of what is held against it is forgiven."""
        if key in self._scores:
            score = self.score(key, now_s) / 2.0
            if score < 0.05:
                del self._scores[key]
            else:
                self._scores[key] = (score, now_s)

    def score(self, key: Key, now_s: float) -> float:
        """Remembered failures, >= 0.0; decays by 63 % in `failure_memory_s`."""
        score, at_s = self._scores.get(key, (0.0, now_s))
        return score * exp(-max(0.0, now_s - at_s) / self._memory_s) if score else 0.0


class Scheduler:
    """One node's order of candidates. Holds what it has in flight and what failed; told all else."""

    def __init__(self, policy: Policy, config: SchedulerConfig, rng: Random) -> None:
        self.policy = policy
        self.config = config
        self.in_flight = InFlight()
        self.health = PeerHealth(config)
        self._rng = rng

    def order(
        self,
        candidates: Sequence[Candidate],
        demand: Demand,
        load_of: Callable[[Key], Load | None],
        round_trip_of: Callable[[NodeId], float | None],
        now_s: float,
        head_start_of: Callable[[Candidate], HeadStart] = lambda _candidate: NO_HEAD_START,
    ) -> tuple[Choice, ...]:
        """Every candidate once, in the order to ask them. Changes nothing but the generator.

        `head_start_of` says what of this very prompt need not be computed at a candidate.
        """
        hopeful: list[Choice] = []
        last_resort: list[Choice] = []
        by_class = sorted(candidates, key=lambda candidate: candidate.priority)
        for _, group in groupby(by_class, key=lambda candidate: candidate.priority):
            views = [
                self._view(one, load_of, round_trip_of, now_s)._replace(
                    head_start=NO_HEAD_START if loading_s(one.offer) else head_start_of(one)
                )
                for one in group
            ]
            for ranked in self.policy.order(views, demand, self._rng):
                view = ranked.view
                failing = view.failures >= self.config.failing_score
                avoid = view.full or failing
                (last_resort if avoid else hopeful).append(
                    Choice(
                        view.candidate,
                        view,
                        self.policy.name,
                        ranked.first_s,
                        ranked.total_s,
                        avoid,
                    )
                )
        return (*hopeful, *last_resort)

    def _view(
        self,
        candidate: Candidate,
        load_of: Callable[[Key], Load | None],
        round_trip_of: Callable[[NodeId], float | None],
        now_s: float,
    ) -> View:
        offer = candidate.offer
        key = (offer.owner, offer.capability_id)
        load = load_of(key)
        since = self.in_flight.since(key, now_s - load.age_s) if load else 0
        return View(
            candidate,
            load,
            self.in_flight.count(key),
            since,
            0.0 if candidate.local else round_trip_of(offer.owner),
            self.health.score(key, now_s),
        )


def _sampled_utilisation(view: View) -> tuple[float, float]:
    load = view.load
    taken = load.busy + load.queued if load else 0
    return taken / view.candidate.offer.slots, -view.candidate.weight


def _utilisation(view: View) -> float:
    return view.occupied / view.candidate.offer.slots


def _mean_utilisation(views: Sequence[View]) -> float:
    """Share of the slots of all views that is taken, 0.0..1.0; 0.5 when nothing is known."""
    known = [view for view in views if view.load is not None]
    slots = sum(view.candidate.offer.slots for view in known)
    return min(1.0, sum(view.occupied for view in known) / slots) if slots else 0.5


def _sorted(
    views: Sequence[View], key: Callable[[View], tuple[float, float]], rng: Random
) -> list[View]:
    """By `key`, equals in random order."""
    return sorted(rng.sample(views, len(views)), key=key)
