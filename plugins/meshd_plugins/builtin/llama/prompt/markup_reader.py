"""Reads the parameters of a call that stand between tags, and tells them as one object of JSON.

Text comes in pieces of any size. Strings are told as they come; what is JSON, or might be null, is told when
it is complete. A value that should be JSON and is none is told as a string, so that arguments can always be
read by whoever gets them. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Final, NoReturn, assert_never

from meshd_plugins.builtin.llama.prompt.markup import NULLS, OTHERS, Markup, ParameterKind

KEY_MAX: Final = 256  # characters of a parameter's name with its tags
VALUE_MAX: Final = 64 * 1024  # of a value that is told when it is complete
_WORDS: Final = {"True": "true", "False": "false", "None": "null"}  # as some templates write them


class Progress(Enum):
    """How far the parameters of a call are."""

    MORE = "more"
    DONE = "done"
    BROKEN = "broken"  # what follows belongs to no call


class _State(Enum):
    BETWEEN = "between"  # two parameters
    BEGIN = "begin"  # of a value: not known yet what it is
    TEXT = "text"


class MarkupReader:
    """Of one call.

    Args:
        markup: its tags.
        kinds: how the parameters of this tool are written.
    """

    def __init__(self, markup: Markup, kinds: Mapping[str, ParameterKind]) -> None:
        self._markup = markup
        self._kinds = kinds
        self._held = ""
        self._told: list[str] = []
        self._state = _State.BETWEEN
        self._kind = ParameterKind.JSON  # of the value that is being read
        self._count = 0
        self._progress = Progress.MORE

    def read(self, text: str, *, final: bool) -> tuple[Progress, str, str]:
        """Take the next text; return how far it is, what became certain of the arguments, and what is left over."""
        self._held += text
        while self._progress is Progress.MORE and self._step(final):
            pass
        told = "".join(self._told)
        self._told.clear()
        if self._progress is Progress.MORE:
            return self._progress, told, ""
        rest, self._held = self._held, ""
        return self._progress, told, rest

    def _step(self, final: bool) -> bool:
        match self._state:
            case _State.BETWEEN:
                return self._between()
            case _State.BEGIN:
                return self._begin(final)
            case _State.TEXT:
                return self._say(final)
            case _:
                assert_never(self._state)

    def _between(self) -> bool:
        """Read a parameter's name, or the end of the call."""
        begun = self._held.lstrip()
        markup = self._markup
        if begun.startswith(markup.closes):
            self._held = begun[len(markup.closes) :]
            self._told.append("}" if self._count else "{}")
            self._progress = Progress.DONE
            return False
        found = self._key(begun)
        if found is None:
            possible = (markup.closes, markup.key[0])
            shorter = any(each.startswith(begun) for each in possible)
            if not shorter and not (begun.startswith(markup.key[0]) and len(begun) < KEY_MAX):
                self._progress = Progress.BROKEN
            return False
        name, end = found
        self._held = begun[end:]
        self._told.append(f"{', ' if self._count else '{'}{json.dumps(name, ensure_ascii=False)}: ")
        self._kind = self._kinds.get(name, self._kinds.get(OTHERS, ParameterKind.JSON))
        self._count += 1
        self._state = _State.BEGIN
        return True

    def _key(self, begun: str) -> tuple[str, int] | None:
        """A parameter's name, and where its value begins; None: not yet, or there is none."""
        opens, closes = self._markup.key
        end = begun[:KEY_MAX].find(closes, len(opens)) if begun.startswith(opens) else -1
        if end < 0:
            return None
        behind = end + len(closes)
        value = self._markup.value[0]
        if value:
            rest = begun[behind:KEY_MAX]
            if not rest.lstrip().startswith(value):
                return None
            behind += len(rest) - len(rest.lstrip()) + len(value)
        return begun[len(opens) : end], behind

    def _begin(self, final: bool) -> bool:
        """Find out what a value is, as early as that is certain."""
        markup = self._markup
        closes = markup.value[1]
        skip = 0
        if markup.lines:
            if not self._held and not final:
                return False
            skip = self._held.startswith("\n")
        value = self._held[skip:]
        if self._kind is not ParameterKind.TEXT:
            end = value[:VALUE_MAX].find(closes)
            if end >= 0:
                self._held = value[end + len(closes) :]
                self._told.append(self._whole(value[:end]))
                self._state = _State.BETWEEN
                return True
            if not final and len(value) < VALUE_MAX and self._may_be_whole(value):
                return False
        self._held = value
        self._told.append('"')
        self._state = _State.TEXT
        return True

    def _may_be_whole(self, value: str) -> bool:
        if self._kind is ParameterKind.JSON:
            return True
        behind = ("\n" if self._markup.lines else "") + self._markup.value[1]
        return any(
            f"{word}{end}".startswith(value)
            for word in NULLS
            for end in (behind, self._markup.value[1])
        )

    def _whole(self, value: str) -> str:
        """A value that is complete, as JSON."""
        bare = value.removesuffix("\n") if self._markup.lines else value
        if self._kind is ParameterKind.TEXT_OR_NULL:
            return "null" if bare in NULLS else _quoted(bare)
        word = _WORDS.get(bare.strip(), bare.strip())
        return word if _is_json(word) else _quoted(bare)

    def _say(self, final: bool) -> bool:
        """Tell a string, but for what may be its end."""
        closes = self._markup.value[1]
        end = self._held.find(closes)
        if end >= 0:
            text, self._held = self._held[:end], self._held[end + len(closes) :]
            if self._markup.lines:
                text = text.removesuffix("\n")
            self._told.append(f'{_escaped(text)}"')
            self._state = _State.BETWEEN
            return True
        keep = 0 if final else _beginning(self._held, closes, lines=self._markup.lines)
        told, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        self._told.append(_escaped(told))
        return False


def _beginning(text: str, closes: str, *, lines: bool) -> int:
    """Length of the end of a text with which the closing tag, or the line break before it, may begin."""
    length = next(
        (n for n in range(min(len(closes) - 1, len(text)), 0, -1) if text.endswith(closes[:n])), 0
    )
    return length + (lines and text[: len(text) - length].endswith("\n"))


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
