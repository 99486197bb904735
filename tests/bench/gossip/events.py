"""What the nodes of a bench tell, and waiting for it.

A node prints lines `T_NS KIND NAME TEXT`: when (`time.time_ns`), what, about which node, and a text.

    READY name          it listens
    JOIN name meta      that node is a member now, for the first time or again
    UPDATE name meta    that node's metadata changed
    USER name text      a message of that node arrived
    SET name text       our own update or message, at the moment it is made
    SUSPECT name        no longer routed to
    RECOVER name        no longer suspected
    LEAVE name          declared dead, or left

The bench itself adds ENDED, when a node's output ends. Other kinds are answers for people. The programs in `peers` and `meshd_node` speak this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import trio

READY, JOIN, UPDATE, USER, SET = "READY", "JOIN", "UPDATE", "USER", "SET"
SUSPECT, RECOVER, LEAVE = "SUSPECT", "RECOVER", "LEAVE"
ENDED = "ENDED"


@dataclass(frozen=True, slots=True)
class Event:
    """One line."""

    at_ns: int
    by: int  # number of the node that printed it
    kind: str
    name: str
    text: str


def parse(line: bytes, by: int) -> Event | None:
    """An event, or None for a line that is none."""
    words = line.decode(errors="replace").split(" ", 3)
    if len(words) < 3 or not words[0].isdigit():
        return None
    text = words[3].strip() if len(words) > 3 else ""
    return Event(int(words[0]), by, words[1], words[2].strip(), text)


class Tally(ABC):
    """Takes in events until it has what it waits for."""

    def __init__(self) -> None:
        self._complete = trio.Event()

    @abstractmethod
    def note(self, event: Event) -> None:
        """Take in one event; call `_check` when it mattered."""

    @abstractmethod
    def _is_complete(self) -> bool: ...

    def _check(self) -> None:
        if self._is_complete():
            self._complete.set()

    async def wait(self, deadline_s: float) -> bool:
        """Whether it was complete within so many seconds from now."""
        self._check()
        with trio.move_on_after(deadline_s):
            await self._complete.wait()
            return True
        return False


class Heard(Tally):
    """When each of some nodes first told a certain thing.

    Args:
        observers: numbers of the nodes that have to.
        kinds: any of these.
        name: about this node; None: about any.
        text: with this text; None: with any.
    """

    def __init__(
        self,
        observers: Iterable[int],
        kinds: Collection[str],
        name: str | None = None,
        text: str | None = None,
    ) -> None:
        super().__init__()
        self.missing = set(observers)
        self.at_ns: dict[int, int] = {}
        self._kinds = kinds
        self._name = name
        self._text = text

    def note(self, event: Event) -> None:
        """Keep the first of each observer."""
        if (
            event.by in self.missing
            and event.kind in self._kinds
            and self._name in (None, event.name)
            and self._text in (None, event.text)
        ):
            self.missing.discard(event.by)
            self.at_ns[event.by] = event.at_ns
            self._check()

    def _is_complete(self) -> bool:
        return not self.missing

    def since_s(self, began_ns: int) -> list[float]:
        """Seconds from then until each observer told it, sorted."""
        return sorted((at_ns - began_ns) / 1e9 for at_ns in self.at_ns.values())


class Ready(Heard):
    """When each of some nodes got ready; complete, with some missing, once one of them has ended.

    Args:
        observers: numbers of the nodes that have to.
    """

    def __init__(self, observers: Iterable[int]) -> None:
        super().__init__(observers, {READY})
        self._ended = False

    def note(self, event: Event) -> None:
        """Keep the first of each, and that one ended."""
        super().note(event)
        if event.kind == ENDED and event.by in self.missing:
            self._ended = True
            self._check()

    def _is_complete(self) -> bool:
        return self._ended or super()._is_complete()


class Pairs(Tally):
    """When each node first told of each other node.

    Args:
        names: of all nodes, by number.
        kinds: any of these.
        with_text: only where the event carries a text.
    """

    def __init__(
        self, names: Collection[str], kinds: Collection[str], *, with_text: bool = False
    ) -> None:
        super().__init__()
        self._names = list(names)
        self._kinds = kinds
        self._with_text = with_text
        self.at_ns: dict[tuple[int, str], int] = {}

    def note(self, event: Event) -> None:
        """Keep the first of each pair."""
        pair = (event.by, event.name)
        if (
            event.kind in self._kinds
            and pair not in self.at_ns
            and event.name != self._names[event.by]
            and (event.text or not self._with_text)
        ):
            self.at_ns[pair] = event.at_ns
            self._check()

    def _is_complete(self) -> bool:
        return len(self.at_ns) >= self.expected

    @property
    def expected(self) -> int:
        """How many pairs there are."""
        return len(self._names) * (len(self._names) - 1)

    def last_s(self, began_ns: int) -> float:
        """Seconds from then until the last pair so far."""
        return (max(self.at_ns.values(), default=began_ns) - began_ns) / 1e9


class Count(Tally):
    """All events of some kinds; never complete."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self._kinds = kinds
        self.events: list[Event] = []

    def note(self, event: Event) -> None:
        """Keep it."""
        if event.kind in self._kinds:
            self.events.append(event)

    def _is_complete(self) -> bool:
        return False

    def about(self, name: str) -> int:
        """How many were about this node."""
        return sum(event.name == name for event in self.events)


class Views(Tally):
    """Which others each node holds for members; complete when `until` says so.

    Args:
        names: of all nodes, by number.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = list(names)
        self._held: list[set[str]] = [set() for _ in self._names]
        self._until: Callable[[], bool] = self.is_whole
        self.changed_ns = 0  # of the last change

    def note(self, event: Event) -> None:
        """Follow joins and leaves."""
        held = self._held[event.by]
        if event.kind == JOIN and event.name != self._names[event.by]:
            held.add(event.name)
        elif event.kind == LEAVE:
            held.discard(event.name)
        else:
            return
        self.changed_ns = event.at_ns
        self._check()

    def is_whole(self) -> bool:
        """Whether everybody holds everybody."""
        return all(len(held) == len(self._names) - 1 for held in self._held)

    def is_split(self, sides: Collection[Collection[int]]) -> bool:
        """Whether nobody holds anybody of another side."""
        for side in sides:
            others = {name for number, name in enumerate(self._names) if number not in side}
            if any(self._held[number] & others for number in side):
                return False
        return True

    def expect(self, until: Callable[[], bool]) -> None:
        """From now on `wait` waits for this."""
        self._until = until
        self._complete = trio.Event()

    def _is_complete(self) -> bool:
        return self._until()
