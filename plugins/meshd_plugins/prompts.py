"""The text a request asks about, whatever its operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshd_plugins.api import BadRequest, Operation, Refused, Request, Value
from meshd_plugins.media import is_medium


def prompt_of(request: Request) -> str:
    """Take the text out of a body: `input` of RUN, `prompt` of COMPLETE, the last user message of CHAT.

    Raises:
        BadRequest: the body lacks it or it is no text.
        Refused: unsupported, for an operation that carries no text.
    """
    match request.operation:
        case Operation.RUN:
            return _text(request.body.get("input"), "input")
        case Operation.COMPLETE:
            return _text(request.body.get("prompt"), "prompt")
        case Operation.CHAT:
            return _last_user_message(request.body.get("messages"))
        case Operation.EMBED | Operation.RERANK | Operation.FETCH | Operation.TUNNEL:
            raise Refused(f"{request.operation} carries no text to answer", code="unsupported")


def _text(value: Value, key: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"the body wants {key!r} as a text")
    return value


def _last_user_message(messages: Value) -> str:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise BadRequest("the body wants 'messages' as a list with at least one message")
    for message in reversed(messages):
        if not isinstance(message, Mapping):
            raise BadRequest("each of 'messages' must have 'role' and 'content'")
        if message.get("role") == "user":
            return _content(message.get("content"))
    raise BadRequest("there is no message of the user in 'messages'")


def _content(content: Value) -> str:
    """A message's text: a string, or the text parts of OpenAI's list form."""
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        if any(isinstance(part, Mapping) and is_medium(part) for part in content):
            raise BadRequest("only text is read here", code="unsupported_modality")
        parts = [
            _text(part.get("text"), "text")
            for part in content
            if isinstance(part, Mapping) and part.get("type") == "text"
        ]
        if parts:
            return "\n".join(parts)
    return _text(content, "content")
