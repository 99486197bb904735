"""How calls begin, up to their arguments, in all ways of writing them; read piece by piece.

A header is a row of parts. It is certain that a text begins with one, or that it does not, as soon as the
text is long enough to tell: nothing is decided by where it happened to be cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from meshd_plugins.builtin.llama.prompt.tools import (
    ARGUMENTS_MARKER,
    CALL_ENDS,
    DEEPSEEK_CALL,
    DEEPSEEK_SEPARATOR,
    MARKUPS,
    ToolFormat,
)

NAME_MAX: Final = 64
_NAMES: Final = re.compile(r"[A-Za-z0-9_.-]*")


class Part(Enum):
    """What a header consists of beside texts."""

    SPACE = "space"  # any white space, or none
    NAME = "name"  # the function's


Parts: TypeAlias = "tuple[Part | str, ...]"


class Reading(Enum):
    """What is known of a text that is no header yet."""

    MORE = "more"  # it may still become one
    OTHER = "other"  # it is none


@dataclass(frozen=True, slots=True)
class Header:
    """The beginning of a call."""

    name: str
    end: int  # where the arguments begin


_S, _N = Part.SPACE, Part.NAME
_JSON: Final[tuple[Parts, ...]] = tuple(
    (_S, "{", _S, '"name"', _S, ":", _S, '"', _N, '"', _S, ",", _S, key, _S, ":", _S, "{")
    for key in ('"arguments"', '"parameters"')
)
_NAMED: Final[Parts] = (_S, _N, ARGUMENTS_MARKER, "{")
_TAGS: Final = MARKUPS[ToolFormat.FUNCTION_TAGS]
_PAIRS: Final = MARKUPS[ToolFormat.ARGUMENT_TAGS]
_INVOKE: Final = MARKUPS[ToolFormat.INVOKE_TAGS]
_DEEPSEEK: Final[tuple[Parts, ...]] = tuple(
    (*opens, *rest)
    for opens in ((_S, DEEPSEEK_CALL), ())
    for rest in (
        (_S, "function", DEEPSEEK_SEPARATOR, _N, _S, "```json", _S, "{"),
        (_S, _N, DEEPSEEK_SEPARATOR, _S, "{"),
    )
)

# The last part of each is where the arguments begin.
HEADERS: Final[Mapping[ToolFormat, tuple[Parts, ...]]] = {
    ToolFormat.HERMES: _JSON,
    ToolFormat.LLAMA3: _JSON,
    ToolFormat.MISTRAL: (*_JSON, _NAMED),
    ToolFormat.MISTRAL_ARGS: (*_JSON, _NAMED),
    ToolFormat.FUNCTION_TAGS: tuple(
        (_S, *opens, _N, _TAGS.call[1], _S, follows)
        for opens in ((_TAGS.call[0],), ())
        for follows in (_TAGS.key[0], _TAGS.closes)
    ),
    ToolFormat.ARGUMENT_TAGS: tuple(
        (_S, _N, _S, follows) for follows in (_PAIRS.key[0], CALL_ENDS)
    ),
    ToolFormat.INVOKE_TAGS: tuple(
        (_S, *opens, _N, _INVOKE.call[1], _S, follows)
        for opens in ((_INVOKE.call[0],), ())
        for follows in (_INVOKE.key[0], _INVOKE.closes)
    ),
    ToolFormat.DEEPSEEK: _DEEPSEEK,
    ToolFormat.DEEPSEEK_FENCED: _DEEPSEEK,
}


def read_header(text: str, choices: Sequence[Parts]) -> Header | Reading:
    """Read one of several headers at the beginning of a text."""
    more = False
    for parts in choices:
        found = _read(text, parts)
        if isinstance(found, Header):
            return found
        more = more or found is Reading.MORE
    return Reading.MORE if more else Reading.OTHER


def _read(text: str, parts: Parts) -> Header | Reading:
    at, name, end = 0, "", 0
    for part in parts:
        if part is Part.SPACE:
            while at < len(text) and text[at].isspace():
                at += 1
        elif part is Part.NAME:
            found = _NAMES.match(text, at)
            assert found is not None, "it fits the empty text too"
            name, at = found[0], found.end()
            if len(name) > NAME_MAX or (not name and at < len(text)):
                return Reading.OTHER
        else:
            end = at
            if not text.startswith(part, at):
                return Reading.MORE if part.startswith(text[at:]) else Reading.OTHER
            at += len(part)
        if at == len(text) and part is not parts[-1]:
            return Reading.MORE
    return Header(name, end)
