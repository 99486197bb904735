"""From a request to what a server is asked: path and body. Pure.

Parameters go on under OpenAI's names, as the edge has checked them; only what a kind of server calls otherwise
is renamed. Images and sound go on as they came, once they are known to be that: a server might fetch what an
address names, which this mesh never does. They are put into the JSON as they are, since base64 holds nothing that JSON
escapes and looking for that takes 25 ms a photo. Completions of Ollama go over its own API: its OpenAI endpoint would
put the prompt into the model's chat template, and its own says how long it took.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeGuard

from meshd_plugins.api import BadRequest, Operation, Refused, Value
from meshd_plugins.builtin.adopt.config import Kind
from meshd_plugins.media import MEDIA_MAX, MEDIA_TYPES, Medium, Modality, is_medium, medium_of

PARAMETERS: Final = (
    "frequency_penalty",
    "grammar",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "min_p",
    "presence_penalty",
    "repeat_penalty",
    "seed",
    "stop",
    "temperature",
    "top_k",
    "top_logprobs",
    "top_p",
)
CHAT_PARAMETERS: Final = (
    "chat_template_kwargs",
    "parallel_tool_calls",
    "reasoning_effort",
    "response_format",
    "tool_choice",
    "tools",
)
TEXT_ONLY: Final = (Modality.TEXT,)
_TEXT_PARTS: Final = ("text", "refusal")
_OLLAMA_OPTIONS: Final[Mapping[str, str]] = {
    "frequency_penalty": "frequency_penalty",
    "max_tokens": "num_predict",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "repeat_penalty": "repeat_penalty",
    "seed": "seed",
    "stop": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
_RENAMED: Final[Mapping[Kind, Mapping[str, str]]] = {
    Kind.VLLM: {"repeat_penalty": "repetition_penalty"}
}
_NOT_TAKEN: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.OLLAMA: ("grammar", "logit_bias", "tool_choice", "chat_template_kwargs"),
    Kind.VLLM: ("grammar",),
    Kind.OPENAI: ("grammar",),
}
"""What a kind of server passes over in silence although it changes the meaning of an answer. Another node may
honour it, so the request is refused."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a server is asked."""

    path: str
    body: bytes
    is_native: bool = False  # Ollama's own API, which answers in lines of JSON


def call_of(
    kind: Kind,
    model: str,
    operation: Operation,
    body: Mapping[str, Value],
    modalities: Sequence[str] = TEXT_ONLY,
) -> Call:
    """Put a chat or a completion into a server's words.

    Of images and sound only the beginnings and the ends are looked at: it may be sent after `check_media`.

    Args:
        kind: of the server.
        model: as the server calls it.
        operation: CHAT or COMPLETE.
        body: as the client or the peer sent it.
        modalities: what the model takes in.

    Raises:
        BadRequest: what is wrong with it; `unsupported_modality`.
        Refused: the server cannot do it.
    """
    match operation:
        case Operation.CHAT:
            messages = body.get("messages")
            if not _is_list(messages) or not messages:
                raise BadRequest("messages must be a list that is not empty")
            gaps = _Gaps(messages, modalities)
            asked: dict[str, Value] = {
                "messages": gaps.messages,
                **_parameters(kind, body, PARAMETERS + CHAT_PARAMETERS),
            }
            return _streamed("/v1/chat/completions", model, asked, gaps)
        case Operation.COMPLETE:
            prompt = body.get("prompt")
            if not isinstance(prompt, str) or not prompt:
                raise BadRequest("prompt must be a string that is not empty")
            if kind is Kind.OLLAMA:
                return _generated(model, prompt, body)
            asked = {"prompt": prompt, **_parameters(kind, body, PARAMETERS)}
            return _streamed("/v1/completions", model, asked)
        case _:
            raise Refused(f"{model} cannot {operation}", code="unsupported")


class _Gaps:
    """Messages with gaps in the place of images and sound, and what belongs there.

    Args:
        messages: as they came.
        modalities: what the model takes in.

    Raises:
        BadRequest: a message holds what is neither text nor a medium that the model takes in.
    """

    def __init__(self, messages: Sequence[Value], modalities: Sequence[str]) -> None:
        self._mark = secrets.token_hex(16)  # nobody can have put it into a text
        self._modalities = modalities
        self._media: list[Medium] = []
        self.messages = [self._message(number, each) for number, each in enumerate(messages)]

    def fill(self, encoded: bytes) -> bytes:
        """The JSON of all that the messages are in, whole."""
        if not self._media:
            return encoded
        before, *rest = encoded.split(self._mark.encode())
        pieces = [before]
        for medium, behind in zip(self._media, rest, strict=True):
            pieces += (medium.text.encode("ascii", "replace"), behind)
        return b"".join(pieces)

    def _message(self, number: int, message: Value) -> Value:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not _is_list(content):
            return message
        where = f"messages[{number}].content"
        parts = [self._part(f"{where}[{index}]", part) for index, part in enumerate(content)]
        return {**message, "content": parts}

    def _part(self, where: str, part: Value) -> Value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXT_PARTS:
            return part
        if not isinstance(part, Mapping) or not is_medium(part):
            told = "a part is text, image_url or input_audio"
            raise BadRequest(f"{where}: {told}", code="unsupported_modality")
        if MEDIA_TYPES[str(kind)] not in self._modalities:
            told = f"this model reads {' and '.join(self._modalities)} only"
            raise BadRequest(f"{where}: {told}", code="unsupported_modality")
        if len(self._media) == MEDIA_MAX:
            raise BadRequest(f"{where}: more than {MEDIA_MAX} images and sounds")
        medium = medium_of(part, where)
        self._media.append(medium)
        inner = part[str(kind)]
        assert isinstance(inner, Mapping)
        name = "url" if medium.modality is Modality.IMAGE else "data"
        return {**part, str(kind): {**inner, name: self._mark}}


def _parameters(kind: Kind, body: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    for name in _NOT_TAKEN.get(kind, ()):
        if body.get(name) not in (None, "", {}, "auto"):
            raise Refused(f"{kind} does not take {name}", code="unsupported")
    renamed = _RENAMED.get(kind, {})
    return {renamed.get(name, name): body[name] for name in names if body.get(name) is not None}


def _streamed(path: str, model: str, asked: Mapping[str, Value], gaps: _Gaps | None = None) -> Call:
    stream: dict[str, Value] = {"stream": True, "stream_options": {"include_usage": True}}
    encoded = to_json({"model": model, **asked, **stream})
    return Call(path, encoded if gaps is None else gaps.fill(encoded))


def _generated(model: str, prompt: str, body: Mapping[str, Value]) -> Call:
    for name in PARAMETERS:
        if name not in _OLLAMA_OPTIONS and body.get(name) not in (None, False, 0):
            raise Refused(f"{model}: Ollama does not take {name} here", code="unsupported")
    options: dict[str, Value] = {
        theirs: body[ours] for ours, theirs in _OLLAMA_OPTIONS.items() if body.get(ours) is not None
    }
    asked: dict[str, Value] = {
        "model": model,
        "prompt": prompt,
        "raw": True,
        "stream": True,
        "options": options,
    }
    return Call("/api/generate", to_json(asked), is_native=True)


def _is_list(value: Value) -> TypeGuard[Sequence[Value]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def to_json(value: Mapping[str, Value]) -> bytes:
    """Encode the body of a request. Raises BadRequest: it holds what JSON cannot carry."""
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest("the request holds what JSON cannot carry") from error
