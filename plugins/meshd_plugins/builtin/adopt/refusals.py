"""What the failures of a server mean to whoever asked. The one place where HTTP statuses become errors of ours."""

from __future__ import annotations

from contextlib import suppress
from typing import Final, NoReturn

from meshd_plugins.api import BadRequest, CapabilityError, Failed, Refused, Value
from meshd_plugins.builtin.adopt.client import Response
from meshd_plugins.builtin.adopt.errors import Broken, ServerError, Slow, TooLarge, Unreachable
from meshd_plugins.builtin.adopt.served import Served
from meshd_plugins.builtin.adopt.untrusted import clean, error_message, parse_json, table

ERROR_BYTES_MAX: Final = 64 * 1024
_TOO_LONG: Final = ("maximum context length", "exceeds the context length", "too large to process")
"""vLLM, Ollama, and llama-server where it embeds: a node with a larger context may take it."""
_UNSUPPORTED: Final = ("does not support", "not supported", "requires --jinja")
"""In the words of servers that could do it with another model or setting: another node may."""


async def refuse(served: Served, response: Response) -> NoReturn:
    """Raise what a status other than 200 means."""
    raw = b""
    with suppress(Broken, TooLarge):
        raw = await response.read(ERROR_BYTES_MAX)
    value: Value = None
    with suppress(Broken):
        value = parse_json(raw)
    words = error_message(value)
    raise _refusal(served, response.status, words, _error_type(value))


def _refusal(served: Served, status: int, words: str, kind: str) -> CapabilityError:
    said = f"{served.client.address} answered {status}" + (f": {words}" if words else "")
    small = words.lower()
    if kind == "exceed_context_size_error" or any(phrase in small for phrase in _TOO_LONG):
        return Refused(said, code="too_large")
    if status == 501 or any(phrase in small for phrase in _UNSUPPORTED):
        return Refused(said, code="unsupported")
    match status:
        case 401 | 403:
            served.troubled()
            return Refused(said, code="not_here")
        case 404:
            if "model" in small:
                served.gone(served.model)
                return Refused(said, code="not_here")
            return Refused(said, code="unsupported")
        case 413:
            return Refused(said, code="too_large")
        case 429:
            return Refused(said, code="busy")
        case 503:
            served.troubled()
            return Refused(said, code="starting" if "loading" in small else "busy")
        case _ if 400 <= status < 500:
            return BadRequest(said)
        case _:
            served.troubled()
            return Failed(said, code="failed")


def _error_type(value: Value) -> str:
    return clean(table(table(value).get("error")).get("type"), 60)


def failure(served: Served, error: ServerError) -> CapabilityError:
    """What a broken exchange means to whoever asked."""
    served.troubled()
    match error:
        case Unreachable():
            return Refused(str(error), code="starting")
        case Slow():
            return Failed(str(error), code="worker_hung")
        case TooLarge():
            return Failed(str(error), code="peer_fault")
        case _:
            return Failed(str(error), code="stream_lost")
