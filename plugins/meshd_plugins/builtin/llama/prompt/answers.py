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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, assert_never

from meshd_plugins.api import ToolCallDelta
from meshd_plugins.builtin.llama.prompt.constraint import Reasoning
from meshd_plugins.builtin.llama.prompt.headers import HEADERS, Header, Reading, read_header
from meshd_plugins.builtin.llama.prompt.markup_reader import MarkupReader, Progress
from meshd_plugins.builtin.llama.prompt.schema_merge import as_map
from meshd_plugins.builtin.llama.prompt.tools import (
    CALL_ENDS,
    DEEPSEEK_CALL,
    DEEPSEEK_CALL_ENDS,
    DEEPSEEK_CALLS_END,
    INVOKES_END,
    MARKUPS,
    ToolFormat,
    ToolSyntax,
)

HEADER_MAX: Final = 4 * 1024  # characters up to a call's arguments
HELD_MAX: Final = 64 * 1024  # of a call that is read when it is complete
CALLS_MAX: Final = 128


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
    PARAMETERS = "parameters"  # those of a call that stand between tags
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
        self._markup: MarkupReader | None = None
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
            case _State.PARAMETERS:
                return self._parameters(final)
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
        form = self._tools.format
        listed = form in (ToolFormat.MISTRAL, ToolFormat.MISTRAL_ARGS) and begun[0] == "["
        if listed and "[" not in self._gap.partition("]")[2]:
            at = len(head) - len(begun) + 1
            self._gap += self._held[:at]
            self._held = self._held[at:]
            return True
        found = read_header(head, HEADERS[form])
        if isinstance(found, Header) and found.name in self._tools.names:
            self._begin_call(found.name, found.end)
            return True
        if found is Reading.MORE and not final:
            return False
        if found is Reading.OTHER and begun[0] == "{" and form in _WHOLE:
            self._json, self._scanned = _Json(), 0
            self._state = _State.WHOLE
            return True
        return self._none_after_all()

    def _begin_call(self, name: str, end: int) -> None:
        self._deltas.append(ToolCallDelta(self._calls, self._new_id(), name))
        self._gap = ""
        self._held = self._held[end:]
        assert self._tools is not None
        markup = MARKUPS.get(self._tools.format)
        if markup is not None:
            self._markup = MarkupReader(markup, self._tools.kinds.get(name, {}))
            self._state = _State.PARAMETERS
            return
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

    def _parameters(self, final: bool) -> bool:
        """A call that breaks off in the middle stays open: nobody may take it for the whole."""
        assert self._markup is not None
        held, self._held = self._held, ""
        progress, told, self._held = self._markup.read(held, final=final)
        if told:
            self._deltas.append(ToolCallDelta(self._calls, arguments=told))
        match progress:
            case Progress.MORE:
                return False
            case Progress.DONE:
                self._end_call()
            case Progress.BROKEN:
                self._calls += 1
                self._state = _State.TEXT
            case _:
                assert_never(progress)
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
        if self._tools.format in _WHOLE:
            self._state = _State.CLOSE
        else:
            self._end_call()
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
        following = _FOLLOWING[self._tools.format]
        for text, state in following:
            if begun.startswith(text):
                self._gap, self._held = text, begun[len(text) :]
                self._state = state
                return True
        if not final and any(text.startswith(begun) for text, _ in following):
            return False
        self._state = _State.TEXT
        return True


_FOLLOWING: Final[Mapping[ToolFormat, tuple[tuple[str, _State], ...]]] = {
    ToolFormat.HERMES: ((CALL_ENDS, _State.TEXT),),
    ToolFormat.MISTRAL: ((",", _State.OPEN), ("]", _State.TEXT)),
    ToolFormat.MISTRAL_ARGS: (),
    ToolFormat.LLAMA3: ((";", _State.OPEN),),
    ToolFormat.FUNCTION_TAGS: ((CALL_ENDS, _State.TEXT),),
    ToolFormat.ARGUMENT_TAGS: (),
    ToolFormat.INVOKE_TAGS: (
        (MARKUPS[ToolFormat.INVOKE_TAGS].call[0], _State.OPEN),
        (INVOKES_END, _State.TEXT),
    ),
    **dict.fromkeys(
        (ToolFormat.DEEPSEEK, ToolFormat.DEEPSEEK_FENCED),
        (
            ("```", _State.BETWEEN),
            (DEEPSEEK_CALL_ENDS, _State.BETWEEN),
            (DEEPSEEK_CALL, _State.OPEN),
            (DEEPSEEK_CALLS_END, _State.TEXT),
        ),
    ),
}
"""What may stand behind a call, and what comes then."""

_WHOLE: Final = (ToolFormat.HERMES, ToolFormat.MISTRAL, ToolFormat.LLAMA3)
"""A call is one object of JSON, with the name in it."""


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
