"""Reads what a model writes: what it thinks, what it says, and which tools it wants called.

Text goes in as it comes, in pieces of any size, and comes out sorted as soon as it is certain what it is.
However the text is split, what comes out is the same when joined. Nothing is lost: what looks like a call
and turns out to be none is content, from its marker on. What a marker is surrounded by (white space, the
marker itself) belongs to none of the three.

A call is told in parts: its name as soon as that is known, then its arguments as they come. It can turn out
to be none only before its name was told. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, assert_never

from meshd_plugins.api import ToolCallDelta
from meshd_plugins.builtin.llama.prompt.constraint import Reasoning
from meshd_plugins.builtin.llama.prompt.schema_merge import as_map
from meshd_plugins.builtin.llama.prompt.tools import (
    ARGUMENTS_MARKER,
    CALL_ENDS,
    ToolFormat,
    ToolSyntax,
)

HEADER_MAX: Final = 4 * 1024  # characters up to a call's arguments
HELD_MAX: Final = 64 * 1024  # of a call that is read when it is complete
CALLS_MAX: Final = 128

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HEADER: Final[tuple[re.Pattern[str] | tuple[str, ...], ...]] = (
    re.compile(r"\s*\{\s*"),
    ('"name"',),
    re.compile(r"\s*:\s*"),
    re.compile(r'"[^"\\]*"'),
    re.compile(r"\s*,\s*"),
    ('"arguments"', '"parameters"'),
    re.compile(r"\s*:\s*"),
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What became certain."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class _State(Enum):
    BEGIN = "begin"  # it may think first
    THINK = "think"
    LEAD = "lead"  # white space before the answer, or a call without a marker
    TEXT = "text"
    OPEN = "open"  # behind a marker: a call is expected
    WHOLE = "whole"  # a call whose parts are in another order: read when it is complete
    ARGUMENTS = "arguments"
    CLOSE = "close"  # behind the arguments, before the call's brace
    BETWEEN = "between"  # behind a call


class _Json:
    """Finds the end of an object or a list, character by character."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def end(self, text: str, start: int = 0) -> int:
        """Where it ends in this text, behind its last bracket; -1: not yet."""
        for index in range(start, len(text)):
            character = text[index]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return -1


class AnswerReader:
    """Of one answer.

    Args:
        reasoning: the markers of a model that thinks; None: it does not.
        tools: what calls look like; None: there are none to be made.
        new_id: makes the id of a call.
    """

    def __init__(
        self,
        reasoning: Reasoning | None,
        tools: ToolSyntax | None,
        new_id: Callable[[], str],
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._new_id = new_id
        self._held: str = ""
        self._gap: str = ""  # what stood before the call that is being read, should it be none
        self._json = _Json()
        self._scanned = 0  # of what is held, by it
        self._calls = 0
        self._undecided_tokens = 0
        self.reasoning_tokens = 0  # those of the markers too
        self.called = False  # a call is complete
        self._state = _State.LEAD
        if reasoning is not None and not reasoning.forbidden:
            self._state = _State.THINK if reasoning.opened else _State.BEGIN
        self._trim = self._state is _State.THINK
        self._text: list[str] = []
        self._thought: list[str] = []
        self._deltas: list[ToolCallDelta] = []

    def feed(self, text: str, tokens: int = 0) -> Parts:
        """Take the next text, which so many tokens were decoded to; return what is certain now."""
        before = self._state
        self._held += text
        self._run(final=False)
        if self._state is _State.BEGIN:
            self._undecided_tokens += tokens
        elif _State.THINK in (before, self._state) or (before is _State.BEGIN and self._thought):
            self.reasoning_tokens += tokens + self._undecided_tokens
            self._undecided_tokens = 0
        return self._take()

    def finish(self) -> Parts:
        """Return what is left: the answer is at its end."""
        self._run(final=True)
        return self._take()

    def _take(self) -> Parts:
        parts = Parts("".join(self._text), "".join(self._thought), tuple(self._deltas))
        self._text.clear()
        self._thought.clear()
        self._deltas.clear()
        return parts

    def _run(self, *, final: bool) -> None:
        while self._step(final):
            pass

    def _step(self, final: bool) -> bool:
        """Do one thing; False: nothing more can be done with what is there."""
        match self._state:
            case _State.BEGIN:
                return self._begin(final)
            case _State.THINK:
                return self._think(final)
            case _State.LEAD:
                return self._lead(final)
            case _State.TEXT:
                return self._say(final)
            case _State.OPEN:
                return self._open(final)
            case _State.WHOLE:
                return self._whole(final)
            case _State.ARGUMENTS:
                return self._arguments()
            case _State.CLOSE:
                return self._close(final)
            case _State.BETWEEN:
                return self._between(final)
            case _:
                assert_never(self._state)

    # -- thinking -----------------------------------------------------------------------------------------

    def _begin(self, final: bool) -> bool:
        assert self._reasoning is not None
        begun = self._held.lstrip()
        opens = self._reasoning.opens
        if begun.startswith(opens):
            self._held = begun[len(opens) :]
            self._state, self._trim = _State.THINK, True
            return True
        if not final and opens.startswith(begun):
            return False
        self._state = _State.LEAD
        return True

    def _think(self, final: bool) -> bool:
        assert self._reasoning is not None
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held
        at = self._held.find(self._reasoning.closes)
        if at >= 0:
            self._thought.append(self._held[:at].rstrip())
            self._held = self._held[at + len(self._reasoning.closes) :]
            self._state, self._trim = _State.LEAD, True
            return True
        keep = 0 if final else _tail(self._held, (self._reasoning.closes,))
        self._thought.append(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    # -- saying -------------------------------------------------------------------------------------------

    def _lead(self, final: bool) -> bool:
        """White space at the beginning is dropped where something of another kind stood before it."""
        if self._tools is None and not self._trim:
            self._state = _State.TEXT
            return True
        begun = self._held.lstrip()
        if not begun and not final:
            return False
        if self._tools is not None and self._tools.bare and begun.startswith("{"):
            self._gap = "" if self._trim else self._held[: len(self._held) - len(begun)]
            self._held = begun
            self._state = _State.OPEN
            return True
        if self._trim:
            self._held = begun
        self._state = _State.TEXT
        return True

    def _say(self, final: bool) -> bool:
        if self._tools is None:
            self._emit(self._held)
            self._held = ""
            return False
        found = [(at, m) for m in self._tools.markers if (at := self._held.find(m)) >= 0]
        if found and self._calls < CALLS_MAX:
            at, marker = min(found)
            text = self._held[:at].rstrip()
            self._gap = self._held[len(text) : at + len(marker)]
            self._emit(text)
            self._held = self._held[at + len(marker) :]
            self._state = _State.OPEN
            return True
        keep = 0 if final else _tail(self._held, self._tools.markers)
        text, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        if final and self._calls and not text.strip():
            text = ""  # what stands behind the last call
        self._emit(text)
        return False

    def _emit(self, text: str) -> None:
        if text:
            self._text.append(text)

    def _none_after_all(self) -> bool:
        """What looked like a call is text; what follows it is looked at anew."""
        self._emit(self._gap)
        self._gap = ""
        if self._held.startswith("{"):  # without a marker: or it would be taken for a call again
            self._emit("{")
            self._held = self._held[1:]
        self._state = _State.TEXT
        return True

    # -- calling ------------------------------------------------------------------------------------------

    def _open(self, final: bool) -> bool:
        assert self._tools is not None
        head = self._held[:HEADER_MAX]
        final = final or len(head) == HEADER_MAX
        begun = head.lstrip()
        if not begun:
            return self._none_after_all() if final else False
        if self._tools.format in (ToolFormat.MISTRAL, ToolFormat.MISTRAL_ARGS):
            if begun[0] == "[" and "[" not in self._gap.partition("]")[2]:
                at = len(head) - len(begun) + 1
                self._gap += self._held[:at]
                self._held = self._held[at:]
                return True
            if begun[0] != "{":
                return self._open_named(begun, final)
        found = _read_header(head)
        if isinstance(found, _Header) and found.name in self._tools.names:
            self._begin_call(found.name, found.end)
            return True
        if found is _Reading.MORE and not final:
            return False
        if found is _Reading.OTHER and begun[0] == "{":
            self._json, self._scanned = _Json(), 0
            self._state = _State.WHOLE
            return True
        return self._none_after_all()

    def _open_named(self, begun: str, final: bool) -> bool:
        """Read `NAME[ARGS]{...}`."""
        assert self._tools is not None
        name = _NAME.match(begun)
        rest = begun[name.end() :] if name else begun
        if name and rest.startswith(f"{ARGUMENTS_MARKER}{{") and name[0] in self._tools.names:
            blank = len(self._held) - len(self._held.lstrip())
            self._begin_call(name[0], blank + name.end() + len(ARGUMENTS_MARKER))
            return True
        if name and not final and f"{ARGUMENTS_MARKER}{{".startswith(rest):
            return False
        return self._none_after_all()

    def _begin_call(self, name: str, end: int) -> None:
        self._deltas.append(ToolCallDelta(self._calls, self._new_id(), name))
        self._gap = ""
        self._held = self._held[end:]
        self._json = _Json()
        self._state = _State.ARGUMENTS

    def _whole(self, final: bool) -> bool:
        assert self._tools is not None
        end = self._json.end(self._held[:HELD_MAX], self._scanned)
        self._scanned = min(len(self._held), HELD_MAX)
        if end < 0:
            return self._none_after_all() if final or len(self._held) >= HELD_MAX else False
        call = _parsed_call(self._held[:end])
        if call is None or call[0] not in self._tools.names:
            return self._none_after_all()
        self._deltas.append(ToolCallDelta(self._calls, self._new_id(), call[0], call[1]))
        self._gap = ""
        self._held = self._held[end:]
        self._end_call()
        return True

    def _arguments(self) -> bool:
        end = self._json.end(self._held)
        text = self._held if end < 0 else self._held[:end]
        if text:
            self._deltas.append(ToolCallDelta(self._calls, arguments=text))
        self._held = self._held[len(text) :]
        if end < 0:
            return False
        assert self._tools is not None
        self._json, self._scanned = _Json(depth=1), 0
        if self._tools.format is ToolFormat.MISTRAL_ARGS:
            self._end_call()
        else:
            self._state = _State.CLOSE
        return True

    def _close(self, final: bool) -> bool:
        """The brace of the call, with whatever it holds beside name and arguments."""
        begun = self._held.lstrip()
        if begun and begun[0] not in "},":
            self._end_call()
            self._state = _State.TEXT
            return True
        end = self._json.end(self._held[:HELD_MAX], self._scanned)
        self._scanned = min(len(self._held), HELD_MAX)
        if end < 0:
            if final or len(self._held) >= HELD_MAX:
                self._end_call()
                self._state = _State.TEXT
                return True
            return False
        self._held = self._held[end:]
        self._end_call()
        return True

    def _end_call(self) -> None:
        self._calls += 1
        self.called = True
        self._state = _State.BETWEEN

    def _between(self, final: bool) -> bool:
        assert self._tools is not None
        begun = self._held.lstrip()
        match self._tools.format:
            case ToolFormat.HERMES:
                if begun.startswith(CALL_ENDS):
                    self._held = begun[len(CALL_ENDS) :]
                    self._state = _State.TEXT
                    return True
                undecided = CALL_ENDS.startswith(begun)
            case ToolFormat.MISTRAL | ToolFormat.LLAMA3:
                separator = "," if self._tools.format is ToolFormat.MISTRAL else ";"
                if begun.startswith(separator):
                    self._gap, self._held = separator, begun[1:]
                    self._state = _State.OPEN
                    return True
                if begun.startswith("]") and separator == ",":
                    self._held = begun[1:]
                    self._state = _State.TEXT
                    return True
                undecided = not begun
            case ToolFormat.MISTRAL_ARGS:
                undecided = False
            case _:
                assert_never(self._tools.format)
        if undecided and not final:
            return False
        self._state = _State.TEXT
        return True


class _Reading(Enum):
    MORE = "more"  # it may still become one
    OTHER = "other"  # it is none


@dataclass(frozen=True, slots=True)
class _Header:
    """The beginning of a call, up to its arguments."""

    name: str
    end: int


def _read_header(text: str) -> _Header | _Reading:
    """Read `{"name": "NAME", "arguments": ` with an object behind it."""
    at, name = 0, ""
    for number, part in enumerate(_HEADER):
        rest = text[at:]
        if isinstance(part, re.Pattern):
            found = part.match(rest)
            if found is None:
                # Each of these patterns fails on a text that may go on only where that is a piece of it.
                incomplete = not rest.strip() or (number == 3 and re.fullmatch(r'"[^"\\]*', rest))
                return _Reading.MORE if incomplete else _Reading.OTHER
            if number == 3:
                name = found[0][1:-1]
            at += found.end()
            continue
        word = next((each for each in part if rest.startswith(each)), None)
        if word is None:
            cut = any(each.startswith(rest) for each in part)
            return _Reading.MORE if cut else _Reading.OTHER
        at += len(word)
    if at == len(text):
        return _Reading.MORE
    return _Header(name, at) if text[at] == "{" else _Reading.OTHER


def _parsed_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call in any order; None: it is none."""
    try:
        call = as_map(json.loads(text))
    except (ValueError, RecursionError):
        return None
    if call is None or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if as_map(arguments) is None:
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)


def _tail(text: str, markers: tuple[str, ...]) -> int:
    """Length of the end of a text that may belong to a marker, with the white space before it."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    kept = text[: len(text) - longest].rstrip()
    return len(text) - len(kept)
