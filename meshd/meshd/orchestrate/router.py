"""One subtask to one capability: resolve, choose, try, try elsewhere.

What is retried: a refusal and a failure before the first piece, on another candidate, at most
`attempts_max` in all and until the deadline. What is not: a bad request (every peer would say the same),
and anything after the first piece, since a second answer glued to half of a first one is neither. A peer
that is silent is given up by deadlines on the first piece and between pieces, so that a hung peer costs
seconds and not the request; time in which our own reader was slow is not counted as its silence.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

import trio

from meshd.core.effects import Address
from meshd.core.frames import WarmHint
from meshd.core.scheduler import Choice, Demand, Scheduler, loading_s
from meshd.orchestrate.access import Decision
from meshd.orchestrate.access_guard import Guard, Source
from meshd.orchestrate.callers import Caller
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.events import (
    REASON_CHARS_MAX,
    AttemptFailed,
    PlannedSubtask,
    Routed,
    SubtaskDone,
)
from meshd.orchestrate.host import CapabilityHost, Emit
from meshd.orchestrate.modalities import needed_by, nobody_takes
from meshd.orchestrate.records import cut_text
from meshd.orchestrate.warmth import Beginning, Warmth
from meshd_cms import NodeId, node_id_text
from meshd_naming import Candidate, Offer, ResolveOptions
from meshd_plugins.api import (
    Chunk,
    Done,
    Failed,
    Operation,
    Privacy,
    Refused,
    Request,
    Value,
)
from meshd_plugins.media import MEDIA_MAX, TOKENS_PER_MEDIUM, is_medium, media_parts

CHARS_PER_TOKEN = 4  # for the estimate of a prompt's length, nothing else
ANSWER_TOKENS_DEFAULT = 128
COMPUTING_STRETCH = 4.0  # of the expected time of all texts: others' texts share the batches
COMPUTING_RATE_MIN = 1.0  # tokens/s
VECTOR_OPERATIONS = frozenset({Operation.EMBED, Operation.RERANK})
"""Their answers are no tokens, and another model's would not be comparable: nothing general stands in."""
LOADING_STRETCH = 2.0  # of the time that loading took when it was measured: the disk may be busy
LOOKING_S = 45.0  # at each image or sound, until its model is through with it: boards have no GPU
LOADING_MAX_S = 600.0  # whatever a peer says
DEADLINE_CODE = "deadline_exceeded"


@dataclass(frozen=True, slots=True)
class Target:
    """A capability of another node."""

    owner: NodeId
    address: Address
    capability_id: str
    hint: WarmHint | None = None  # where else the request's beginning is warm


class Remote(Protocol):
    """Capabilities of other nodes, as the router needs them."""

    async def invoke(self, target: Target, request: Request, caller: Caller, emit: Emit) -> Done:
        """Run a request on a peer. Raises Refused, BadRequest or Failed; state as those say."""
        ...


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Bounds of one subtask."""

    attempts_max: int = 3  # candidates that are asked. Up: fewer failures, later ones
    first_piece_s: float = 30.0  # silence before the first piece. Up: tolerates slow prefill
    between_pieces_s: float = 15.0  # silence between pieces. Up: notices a hung peer later


@dataclass(slots=True)
class RouterStatistics:
    """What routing did so far."""

    requests: int = 0
    forwarded: int = 0
    served_here: int = 0
    retries: int = 0
    refusals: int = 0
    failures: int = 0
    hung: int = 0
    not_served: int = 0
    not_allowed: int = 0  # all that serve it were ruled out by the rules of this node
    hinted: int = 0  # told the one asked that the beginning is warm elsewhere


class Router:
    """Runs subtasks on the best candidate, here or on a peer."""

    def __init__(
        self,
        config: RouterConfig,
        catalogue: Catalogue,
        scheduler: Scheduler,
        host: CapabilityHost,
        remote: Remote,
        guard: Guard,
        warmth: Warmth,
    ) -> None:
        self._guard = guard
        self._warmth = warmth
        self._config = config
        self._catalogue = catalogue
        self._scheduler = scheduler
        self._host = host
        self._remote = remote
        self.statistics = RouterStatistics()

    async def run(
        self,
        subtask: PlannedSubtask,
        request: Request,
        caller: Caller,
        *,
        routed: Callable[[Routed | AttemptFailed], Awaitable[None]],
        emit: Emit,
    ) -> SubtaskDone:
        """Run one subtask to its end.

        Args:
            subtask: its name and operation decide who may serve it.
            request: `deadline_s` is what is left of the whole ask.
            caller: who asks.
            routed: told of each attempt before it starts, and before the next one why it came to nothing.
            emit: gets the pieces.

        Raises:
            NamingError: malformed, or nobody serves the name (`NotServed`, with what is near).
            BadRequest, Refused, Failed: as the last candidate said, with all that were asked.
        """
        self.statistics.requests += 1
        began_s = trio.current_time()
        deadline = _Deadline(began_s + request.deadline_s, request.deadline_s)
        beginning = self._warmth.begin(request, caller)
        choices = self._candidates(subtask, request, caller, beginning)
        failures: list[tuple[str, Refused | Failed]] = []
        failed: list[AttemptFailed] = []
        for attempt, choice in enumerate(choices, 1):
            if attempt > 1:
                self.statistics.retries += 1
                await routed(failed[-1])
            await routed(_routed(subtask, choice, attempt))
            trial = _Trial(self, choice.candidate, caller, deadline, emit, beginning)
            try:
                done = await trial.run(request)
            except (Refused, Failed) as failure:
                failures.append((choice.candidate.offer.node_name, failure))
                late = deadline.passed() or failure.code == DEADLINE_CODE
                if late or trial.first_at_s is not None:
                    break
                failed.append(_attempt_failed(subtask, choice, attempt, failure))
                continue
            ended = _subtask_done(subtask, choice.candidate, done, began_s, trial.first_at_s)
            return replace(ended, failed=tuple(failed))
        raise _told(failures)

    def _candidates(
        self, subtask: PlannedSubtask, request: Request, caller: Caller, beginning: Beginning
    ) -> tuple[Choice, ...]:
        options = ResolveOptions(
            operation=str(subtask.operation),
            allow_general=subtask.operation not in VECTOR_OPERATIONS,
            privacy=request.privacy,
            allow_cloud=request.privacy is Privacy.CLOUD,
            modalities=needed_by(request.body),
        )
        resolution = self._catalogue.resolve(subtask.name, options)
        if not resolution.candidates:
            self.statistics.not_served += 1
            if options.modalities and self._is_served(subtask.name, options):
                offers = self._catalogue.offers()
                raise nobody_takes(subtask.name, options.modalities, offers)
            raise resolution.not_served()
        ordered = self._scheduler.order(
            resolution.candidates,
            demand_of(request),
            self._catalogue.load_of,
            self._catalogue.round_trip_of,
            trio.current_time(),
            beginning.head_start,
        )
        return self._allowed(ordered, request, caller)

    def _is_served(self, name: str, options: ResolveOptions) -> bool:
        """Whether somebody serves it to requests that are text alone."""
        plain = replace(options, modalities=())
        return bool(self._catalogue.resolve(name, plain).candidates)

    def _allowed(
        self, ordered: tuple[Choice, ...], request: Request, caller: Caller
    ) -> tuple[Choice, ...]:
        """The first ones that may be tried. Who serves asks the same again, by its own rules."""
        chosen: list[Choice] = []
        refused: Decision | None = None
        for choice in ordered:
            decision = self._guard.may_send(choice.candidate.offer, caller, request.privacy)
            if not decision.allowed:
                refused = refused or decision
                continue
            chosen.append(choice)
            if len(chosen) == self._config.attempts_max:
                break
        if not chosen and refused is not None:
            self.statistics.not_allowed += 1
            raise Refused(refused.why, code=refused.code)
        return tuple(chosen)

    async def attempt(
        self,
        candidate: Candidate,
        request: Request,
        caller: Caller,
        emit: Emit,
        beginning: Beginning,
    ) -> Done:
        """Ask one candidate, counting it in flight and remembering how it went."""
        offer = candidate.offer
        request = replace(request, tags=beginning.tags(candidate))
        hint = beginning.hint(
            candidate, lambda other: self._guard.may_send(other, caller, request.privacy).allowed
        )
        self.statistics.hinted += hint is not None
        key = (offer.owner, offer.capability_id)
        token = self._scheduler.in_flight.begin(key, trio.current_time())
        try:
            if candidate.local:
                self.statistics.served_here += 1
                source = Source(caller, hint=hint)
                done = await self._host.invoke(offer.capability_id, request, emit, source)
            else:
                done = await self._forward(candidate, request, caller, emit, hint)
        except Failed as failure:
            self.statistics.failures += 1
            if failure.code != DEADLINE_CODE:  # how long it may take was our choice
                self._scheduler.health.failed(key, trio.current_time())
            raise
        except Refused:
            self.statistics.refusals += 1
            raise
        else:
            self._scheduler.health.succeeded(key, trio.current_time())
            beginning.served(candidate, done.usage)
            return done
        finally:
            self._scheduler.in_flight.finish(token, trio.current_time())

    async def _forward(
        self,
        candidate: Candidate,
        request: Request,
        caller: Caller,
        emit: Emit,
        hint: WarmHint | None,
    ) -> Done:
        offer = candidate.offer
        address = self._catalogue.address_of(offer.owner)
        if address is None:
            raise Refused(f"{offer.node_name} is not a member any more", code="not_here")
        self.statistics.forwarded += 1
        forwarded = replace(request, hops=request.hops + 1)
        target = Target(offer.owner, address, offer.capability_id, hint)
        return await self._remote.invoke(target, forwarded, caller, emit)

    def note_hung(self, candidate: Candidate) -> None:
        """A candidate was silent for too long: hold it against it."""
        self.statistics.hung += 1
        key = (candidate.offer.owner, candidate.offer.capability_id)
        self._scheduler.health.failed(key, trio.current_time())

    @property
    def config(self) -> RouterConfig:
        """The bounds in force."""
        return self._config


@dataclass(frozen=True, slots=True)
class _Deadline:
    """When the caller gives up."""

    at_s: float  # trio's clock
    asked_s: float  # as it was asked for

    def passed(self) -> bool:
        return trio.current_time() >= self.at_s

    def error(self) -> Failed:
        return Failed(f"not done within {self.asked_s:g} s", code=DEADLINE_CODE)


class _Trial:
    """One attempt, watched: silence beyond the bounds ends it, and so does the deadline."""

    def __init__(
        self,
        router: Router,
        candidate: Candidate,
        caller: Caller,
        deadline: _Deadline,
        emit: Emit,
        beginning: Beginning,
    ) -> None:
        self._beginning = beginning
        self._router = router
        self._candidate = candidate
        self._caller = caller
        self._deadline = deadline
        self._emit = emit
        self._silence = trio.CancelScope()
        self._computing_s = self._looking_s = 0.0  # silence that is no wonder
        self.first_at_s: float | None = None  # when the first piece came

    async def run(self, request: Request) -> Done:
        """The end of the answer.

        Raises:
            Refused, BadRequest, Failed: as the candidate said; `peer_hung`; `deadline_exceeded`.
        """
        now_s = trio.current_time()
        if now_s >= self._deadline.at_s:
            raise self._deadline.error()
        request = replace(request, deadline_s=self._deadline.at_s - now_s)
        self._computing_s = COMPUTING_STRETCH * computing_s(self._candidate.offer, request)
        self._looking_s = LOOKING_S * min(_media_count(request), MEDIA_MAX)
        self._silence.deadline = now_s + self._first_piece_s
        with trio.move_on_at(self._deadline.at_s):
            with self._silence:
                return await self._router.attempt(
                    self._candidate, request, self._caller, self._piece, self._beginning
                )
            raise self._hung()
        raise self._deadline.error()

    @property
    def _first_piece_s(self) -> float:
        """How long it may be silent at first: longer when it must load its model before it can begin, or look."""
        load_s = min(loading_s(self._candidate.offer), LOADING_MAX_S)
        first_s = self._router.config.first_piece_s + self._looking_s
        return first_s + LOADING_STRETCH * load_s + self._computing_s

    @property
    def _between_pieces_s(self) -> float:
        return self._router.config.between_pieces_s + self._computing_s

    def _hung(self) -> Failed:
        self._router.note_hung(self._candidate)
        silent_s = self._first_piece_s if self.first_at_s is None else self._between_pieces_s
        return Failed(f"nothing came for {silent_s:.0f} s", code="peer_hung")

    async def _piece(self, chunk: Chunk) -> None:
        if self.first_at_s is None:
            self.first_at_s = trio.current_time()
        self._silence.deadline = inf  # our own reader may be slow: that is not the peer's silence
        await self._emit(chunk)
        self._silence.deadline = trio.current_time() + self._between_pieces_s


def _routed(subtask: PlannedSubtask, choice: Choice, attempt: int) -> Routed:
    offer = choice.candidate.offer
    return Routed(
        subtask=subtask.id,
        node=node_id_text(offer.owner),
        node_name=offer.node_name,
        name=offer.name.path,
        capability_id=offer.capability_id,
        reason=choice.reason,
        attempt=attempt,
    )


def _attempt_failed(
    subtask: PlannedSubtask, choice: Choice, attempt: int, failure: Refused | Failed
) -> AttemptFailed:
    offer = choice.candidate.offer
    return AttemptFailed(
        subtask=subtask.id,
        node=node_id_text(offer.owner),
        node_name=offer.node_name,
        capability_id=offer.capability_id,
        attempt=attempt,
        refused=isinstance(failure, Refused),
        code=cut_text(failure.code, REASON_CHARS_MAX),
        reason=cut_text(failure.message, REASON_CHARS_MAX),
    )


def _subtask_done(
    subtask: PlannedSubtask,
    candidate: Candidate,
    done: Done,
    began_s: float,
    first_at_s: float | None,
) -> SubtaskDone:
    now_s = trio.current_time()
    return SubtaskDone(
        subtask=subtask.id,
        node_name=candidate.offer.node_name,
        name=candidate.offer.name.path,
        first_s=(now_s if first_at_s is None else first_at_s) - began_s,
        total_s=now_s - began_s,
        usage=done.usage,
        finish_reason=done.finish_reason,
        detail=done.detail,
    )


def _told(failures: Sequence[tuple[str, Refused | Failed]]) -> Refused | Failed:
    """The last failure, with what all that were asked said."""
    last = failures[-1][1]
    said = "; ".join(f"{node}: {failure.message}" for node, failure in failures)
    message = f"asked {len(failures)} peers; {said}" if len(failures) > 1 else said
    kind = Refused if isinstance(last, Refused) else Failed  # a plugin's own subclass stays there
    return kind(message, code=last.code)


def computing_s(offer: Offer, request: Request) -> float:
    """How long a peer computes without a word: vectors come by the batch, and text at once."""
    if request.operation not in VECTOR_OPERATIONS or offer.rates is None:
        return 0.0
    return demand_of(request).prompt_tokens / max(
        offer.rates.prefill_tokens_per_s, COMPUTING_RATE_MIN
    )


def _media_count(request: Request) -> int:
    return sum(1 for _ in media_parts(request.body.get("messages")))


def demand_of(request: Request) -> Demand:
    """What a request is expected to take: its prompt's length by characters, and the asked maximum.

    An image or a sound counts as `TOKENS_PER_MEDIUM`, however many characters stand for it.
    """
    prompt = 1 + _text_length(request.body) // CHARS_PER_TOKEN
    if request.operation in VECTOR_OPERATIONS:
        documents, query = request.body.get("documents"), request.body.get("query")
        if isinstance(documents, list | tuple):  # the query is read with each of them
            prompt += max(0, len(documents) - 1) * _text_length(query) // CHARS_PER_TOKEN
        return Demand(prompt_tokens=prompt, answer_tokens=0)
    asked = request.body.get("max_tokens")
    answer = asked if isinstance(asked, int) and asked > 0 else ANSWER_TOKENS_DEFAULT
    return Demand(prompt_tokens=prompt, answer_tokens=answer)


def _text_length(value: Value) -> int:
    match value:
        case str():
            return len(value)
        case Mapping() if is_medium(value):
            return TOKENS_PER_MEDIUM * CHARS_PER_TOKEN
        case Mapping():
            return sum(_text_length(each) for each in value.values())
        case list() | tuple():
            return sum(_text_length(each) for each in value)
        case _:
            return 0
