"""Reading what a server sent: JSON within bounds, lines of a stream, and texts made fit for people.

Everything here is pure. What is not as expected is left out or raised as `Broken`; nothing else is raised.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Final, NoReturn, cast

from meshd_plugins.api import Value
from meshd_plugins.builtin.adopt.errors import Broken, TooLarge

LINE_BYTES_MAX: Final = 1024 * 1024
TEXT_CHARS_MAX: Final = 300
COUNT_MAX: Final = 2**53

_UNFIT: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]+"
)


def parse_json(raw: bytes) -> Value:
    """Decode JSON. Raises Broken: it is none, is nested too deeply, or holds what no JSON does."""
    try:
        return cast("Value", json.loads(raw, parse_constant=_no_constant))
    except (ValueError, RecursionError) as error:
        raise Broken("the server sent what is no JSON") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def clean(value: Value, chars_max: int = TEXT_CHARS_MAX) -> str:
    """A text for people: one line, cut, without control characters and halves of surrogate pairs; else ""."""
    if not isinstance(value, str):
        return ""
    text = sound(_UNFIT.sub(" ", value[: 4 * chars_max])).strip()
    return text if len(text) <= chars_max else text[: chars_max - 1] + "…"


def sound(text: str) -> str:
    """The text as UTF-8 can carry it: halves of surrogate pairs become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def table(value: Value) -> Mapping[str, Value]:
    """A JSON object; what is none is empty."""
    return value if isinstance(value, Mapping) else {}


def rows(value: Value, count_max: int) -> tuple[Mapping[str, Value], ...]:
    """The objects of a list, at most so many; what is no list is empty."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return ()
    return tuple(row for row in value[:count_max] if isinstance(row, Mapping))


def count(value: Value) -> int:
    """A whole number that is not negative and not absurd; else 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= COUNT_MAX:
        return 0
    return value


def number(value: Value) -> float:
    """A finite number that is not negative and not absurd; else 0.0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    if not 0 <= value <= COUNT_MAX or not math.isfinite(value):
        return 0.0
    return float(value)


class Lines:
    """Cuts a stream of bytes into lines. A line that does not end within `LINE_BYTES_MAX` is TooLarge."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._searched = (
            0  # bytes that hold no end of a line: a stream in single bytes costs no more
        )

    def feed(self, piece: bytes) -> Generator[bytes]:
        """Take bytes; yield the lines that are whole, without their ends. Raises TooLarge."""
        self._kept += piece
        while (end := self._kept.find(b"\n", self._searched)) >= 0:
            line = bytes(self._kept[:end]).removesuffix(b"\r")
            del self._kept[: end + 1]
            self._searched = 0
            yield line
        self._searched = len(self._kept)
        if self._searched > LINE_BYTES_MAX:
            raise TooLarge(f"the server sent a line of more than {LINE_BYTES_MAX} bytes")


class ServerSentEvents:
    """Puts the data of server-sent events together (WHATWG HTML, 9.2), within `LINE_BYTES_MAX` each."""

    def __init__(self) -> None:
        self._data: list[bytes] = []
        self._bytes = 0

    def take(self, line: bytes) -> bytes | None:
        """Take a line; return the data of the event that it ends, or None. Raises TooLarge."""
        if not line:
            data = b"\n".join(self._data) if self._data else None
            self._data, self._bytes = [], 0
            return data
        name, _, value = line.partition(b":")
        if name in (b"data", b"error"):  # older llama-servers tell errors by a field of that name
            self._data.append(value.removeprefix(b" "))
            self._bytes += len(line) + 1
            if self._bytes > LINE_BYTES_MAX:
                raise TooLarge(f"the server sent an event of more than {LINE_BYTES_MAX} bytes")
        return None


def error_message(value: Value) -> str:
    """What an error in OpenAI's, llama-server's or Ollama's shape says, cleaned; "" where it says nothing."""
    error = table(value).get("error")
    if isinstance(error, Mapping):
        return clean(error.get("message"))
    return clean(error) or clean(table(value).get("message")) or clean(table(value).get("detail"))
