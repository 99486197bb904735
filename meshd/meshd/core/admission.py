"""Who may start now, who waits, who is told to go elsewhere: for one capability.

Slots bound what runs, `queue_max` bounds what waits; nothing else does. A request is refused at once
rather than queued when the queue is full, when the capability drains, or when its remaining time cannot
cover the expected wait and service: a refusal in a millisecond lets the caller ask another peer, a
timeout does not.

The queue is first come, first served for each caller, and callers take turns, so that one that sends
many requests delays itself and not the others. Where it is full, the latest ticket of the caller with most gives way
to one of a caller with at least two fewer: who sends many fills no queue against the others either.

Invariants: never more than `slots` run; never more than `queue_max` wait; a ticket is in exactly one place
(running, waiting, or handed back: refused, admitted by `release`, given way, returned by `expire` or `drain`, or
cancelled); no slot is free while a ticket that can still make its deadline waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

SERVICE_GAIN = 0.2  # of each finished request in the running mean of service times


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Limits of one capability."""

    slots: int  # requests served at once, >= 1. Up: more at once, each slower
    queue_max: int = 8  # requests that wait. Up: fewer refusals, longer waits

    def __post_init__(self) -> None:
        assert self.slots >= 1
        assert self.queue_max >= 0


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One request at the door. Compared by identity: ids from peers may repeat, tickets do not."""

    request_id: str
    caller: str  # who takes turns with whom: the entry node's id
    deadline_s: float  # monotonic; the caller has given up then
    service_s: float = 0.0  # what it will take once started, estimated from tokens; 0.0: unknown


@dataclass(frozen=True, slots=True)
class Admitted:
    """It has a slot now; `release` gives the slot back."""


@dataclass(frozen=True, slots=True)
class Queued:
    """It waits; `release` of another will return it, `cancel` takes it out."""

    position: int  # tickets before it at the latest, and itself: 1 is next
    wait_s: float  # expected; 0.0 when no service time is known yet
    gave_way: Ticket | None = None  # it waited, and is to be refused as `busy`


@dataclass(frozen=True, slots=True)
class Refused:
    """It was not taken and is not kept."""

    code: str  # "busy" | "draining": codes of meshd_plugins.api.Refused
    message: str


Verdict: TypeAlias = Admitted | Queued | Refused


class Admission:
    """The door of one capability. Not for concurrent use: one task owns it."""

    def __init__(self, config: AdmissionConfig) -> None:
        self.config = config
        self._running: dict[Ticket, float] = {}  # started at
        self._waiting: dict[str, deque[Ticket]] = {}  # by caller, in order of turns; never empty
        self._waiting_count = 0
        self._draining = False
        self._service_s = 0.0  # running mean of service times; 0.0: none seen
        self._counters: dict[str, int] = dict.fromkeys(
            (
                "admitted",
                "queued",
                "refused_busy",
                "refused_deadline",
                "gave_way",
                "refused_draining",
                "cancelled",
                "expired",
                "released",
            ),
            0,
        )

    def request(self, ticket: Ticket, now_s: float) -> Verdict:
        """Ask for a slot. Refused leaves nothing behind."""
        assert ticket not in self._running
        if self._draining:
            return self._refuse("draining", "refused_draining", "it takes no new work")
        remaining_s = ticket.deadline_s - now_s
        if remaining_s <= 0.0:
            return self._refuse("busy", "refused_deadline", "the deadline has passed")
        if len(self._running) < self.config.slots:
            # Only the request's own estimate counts here: judged by the mean of others, one long
            # request could close an idle node to all short ones, and no sample would ever reopen it.
            if ticket.service_s > remaining_s:
                return self._refuse_late(ticket.service_s, remaining_s)
            self._start(ticket, now_s)
            return Admitted()
        is_full = self._waiting_count >= self.config.queue_max
        giving_way = self._with_most(ticket.caller) if is_full else None
        if is_full and giving_way is None:
            waits = f"{len(self._running)} run and {self._waiting_count} wait"
            return self._refuse("busy", "refused_busy", waits)
        position = self._position(ticket.caller)
        wait_s = self.held_s(now_s) * position / self.config.slots
        if wait_s + ticket.service_s > remaining_s:
            return self._refuse_late(wait_s + ticket.service_s, remaining_s)
        gave_way = None
        if giving_way is not None:
            gave_way = self._waiting[giving_way].pop()
            self._waiting_count -= 1
            self._counters["gave_way"] += 1
        self._waiting.setdefault(ticket.caller, deque()).append(ticket)
        self._waiting_count += 1
        self._counters["queued"] += 1
        return Queued(position, wait_s, gave_way)

    def release(self, ticket: Ticket, now_s: float) -> tuple[Ticket, ...]:
        """A running request ended, however; returns the tickets that have a slot from now on.

        Tickets past their deadline are stepped over and stay until `expire` or `cancel`.
        """
        took_s = max(0.0, now_s - self._running.pop(ticket))
        gain = SERVICE_GAIN if self._counters["released"] else 1.0
        self._service_s += gain * (took_s - self._service_s)
        self._counters["released"] += 1
        return self._fill(now_s)

    def cancel(self, ticket: Ticket) -> bool:
        """The caller of a waiting request went away; False when it does not wait (any more)."""
        queue = self._waiting.get(ticket.caller)
        if queue is None or ticket not in queue:
            return False
        queue.remove(ticket)
        self._forget_if_empty(ticket.caller)
        self._waiting_count -= 1
        self._counters["cancelled"] += 1
        return True

    def holds(self, ticket: Ticket) -> bool:
        """Whether it has a slot now."""
        return ticket in self._running

    def expire(self, now_s: float) -> tuple[Ticket, ...]:
        """Take out and return the waiting tickets whose deadline has passed."""
        late = tuple(
            ticket
            for queue in self._waiting.values()
            for ticket in queue
            if ticket.deadline_s <= now_s
        )
        for ticket in late:
            self._waiting[ticket.caller].remove(ticket)
            self._forget_if_empty(ticket.caller)
        self._waiting_count -= len(late)
        self._counters["expired"] += len(late)
        return late

    def drain(self) -> tuple[Ticket, ...]:
        """Refuse all from now on; returns those that waited, for the shell to refuse. What runs, runs."""
        self._draining = True
        waiting = tuple(ticket for queue in self._waiting.values() for ticket in queue)
        self._waiting.clear()
        self._waiting_count = 0
        self._counters["refused_draining"] += len(waiting)
        return waiting

    def load(self) -> dict[str, int]:
        """What every reply and the soft state carry: slots, busy, queued, queue_max, draining (0 or 1)."""
        return {
            "slots": self.config.slots,
            "busy": len(self._running),
            "queued": self._waiting_count,
            "queue_max": self.config.queue_max,
            "draining": int(self._draining),
        }

    def held_s(self, now_s: float) -> float:
        """How long a request is expected to hold its slot, in seconds; 0.0 when nothing is known.

        The mean of those that ended, or how long those that run have run by now, if that is more: of a
        door that is full of long ones, none may have ended yet.
        """
        running = self._running.values()
        ages_s = sum(now_s - started_s for started_s in running)
        return max(self._service_s, ages_s / len(running) if running else 0.0)

    def counters(self) -> Mapping[str, int]:
        """Events since the start, by kind; a closed set."""
        return dict(self._counters)

    def _start(self, ticket: Ticket, now_s: float) -> None:
        self._running[ticket] = now_s
        self._counters["admitted"] += 1

    def _fill(self, now_s: float) -> tuple[Ticket, ...]:
        started: list[Ticket] = []
        while len(self._running) < self.config.slots:
            ticket = self._next(now_s)
            if ticket is None:
                break
            self._start(ticket, now_s)
            started.append(ticket)
        return tuple(started)

    def _next(self, now_s: float) -> Ticket | None:
        """Take out the next ticket in turn that is not late; its caller goes to the end of the turns."""
        for caller, queue in self._waiting.items():
            for ticket in queue:
                if ticket.deadline_s > now_s:
                    queue.remove(ticket)
                    self._waiting_count -= 1
                    del self._waiting[caller]
                    if queue:
                        self._waiting[caller] = queue
                    return ticket
        return None

    def _position(self, caller: str) -> int:
        """Place that a new ticket of `caller` gets: own ones before it, and a turn of others for each."""
        own = len(self._waiting.get(caller, ()))
        others = (len(queue) for other, queue in self._waiting.items() if other != caller)
        return own + 1 + sum(min(count, own + 1) for count in others)

    def _with_most(self, caller: str) -> str | None:
        """The caller with most that wait, if that is at least two more than this one has."""
        most = max(self._waiting, key=lambda each: len(self._waiting[each]), default=None)
        if most is None or len(self._waiting[most]) < len(self._waiting.get(caller, ())) + 2:
            return None
        return most

    def _forget_if_empty(self, caller: str) -> None:
        if not self._waiting[caller]:
            del self._waiting[caller]

    def _refuse_late(self, needed_s: float, remaining_s: float) -> Refused:
        message = f"about {needed_s:.1f} s needed, {remaining_s:.1f} s left"
        return self._refuse("busy", "refused_deadline", message)

    def _refuse(self, code: str, counter: str, message: str) -> Refused:
        self._counters[counter] += 1
        return Refused(code, message)
