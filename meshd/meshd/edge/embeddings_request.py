"""Bodies of `/v1/embeddings` and `/v1/rerank`, checked and turned into what the mesh is asked. No I/O.

The first is OpenAI's; the second is that of Jina and Cohere, as llama-server offers it. What has no effect on
the answer (`user`, and whatever else is unknown) is ignored, as in `openai_request`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from meshd.edge.errors import RequestError
from meshd.edge.openai_request import deadline, privacy
from meshd_plugins.api import Operation, Privacy, Value
from meshd_plugins.vectors import DIMENSIONS_MAX, INPUTS_MAX

_EXTENSION: Final = ("deadline_s", "privacy", "truncate")
_BASE64, _FLOAT = "base64", "float"


@dataclass(frozen=True, slots=True)
class VectorRequest:
    """A request that may be asked."""

    model: str  # as the client wrote it
    operation: Operation
    body: Mapping[str, Value]
    texts: tuple[str, ...]  # one row of the answer each
    deadline_s: float | None
    privacy: Privacy | None  # None: the node's default
    base64: bool = False
    top_n: int = INPUTS_MAX
    return_documents: bool = False


def parse_embeddings(payload: Mapping[str, Value]) -> VectorRequest:
    """A body of `/v1/embeddings`.

    Raises:
        RequestError: 400, with `param` naming what is wrong.
    """
    value = payload.get("input")
    texts = _texts([value] if isinstance(value, str) else value, "input")
    body: dict[str, Value] = {"input": list(texts), "truncate": _truncate(payload)}
    dimensions = _integer(payload, "dimensions", DIMENSIONS_MAX)
    if dimensions is not None:
        body["dimensions"] = dimensions
    encoding = payload.get("encoding_format")
    if encoding not in (None, _FLOAT, _BASE64):
        raise RequestError(
            f"`encoding_format` must be {_FLOAT!r} or {_BASE64!r}", param="encoding_format"
        )
    extension = _extension(payload)
    return VectorRequest(
        model=_model(payload),
        operation=Operation.EMBED,
        body=body,
        texts=texts,
        deadline_s=deadline(extension, within="meshd."),
        privacy=privacy(extension, within="meshd."),
        base64=encoding == _BASE64,
    )


def parse_rerank(payload: Mapping[str, Value]) -> VectorRequest:
    """A body of `/v1/rerank`.

    Raises:
        RequestError: 400, with `param` naming what is wrong.
    """
    query = payload.get("query")
    if not isinstance(query, str) or not query:
        raise RequestError(
            "`query` must be a text that is not empty", param="query", code=_missing(query)
        )
    documents = payload.get("documents")
    if isinstance(documents, list):  # Cohere's clients send objects with a text
        documents = [each.get("text") if isinstance(each, Mapping) else each for each in documents]
    texts = _texts(documents, "documents")
    extension = _extension(payload)
    return VectorRequest(
        model=_model(payload),
        operation=Operation.RERANK,
        body={
            "query": _unicode(query, "query"),
            "documents": list(texts),
            "truncate": _truncate(payload),
        },
        texts=texts,
        deadline_s=deadline(extension, within="meshd."),
        privacy=privacy(extension, within="meshd."),
        top_n=_integer(payload, "top_n", 2**31) or INPUTS_MAX,
        return_documents=_boolean(payload, "return_documents"),
    )


def _texts(value: Value, param: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"`{param}` must be a list of texts that is not empty",
            param=param,
            code=_missing(value),
        )
    if all(isinstance(each, int | list) for each in value):
        raise RequestError(
            f"`{param}` holds numbers of tokens, which mean something to one vocabulary only: send "
            "texts (with LangChain: check_embedding_ctx_length=False)",
            param=param,
            code="unsupported_parameter",
        )
    if len(value) > INPUTS_MAX:
        raise RequestError(
            f"`{param}` holds {len(value)} texts; at most {INPUTS_MAX} go into one request",
            param=param,
        )
    texts: list[str] = []
    for number, text in enumerate(value):
        where = f"{param}[{number}]"
        if not isinstance(text, str) or not text:
            raise RequestError(f"`{where}` must be a text that is not empty", param=where)
        texts.append(_unicode(text, where))
    return tuple(texts)


def _model(payload: Mapping[str, Value]) -> str:
    model = payload.get("model")
    if not isinstance(model, str) or not model:
        raise RequestError(
            "`model` must be a name such as 'computation.gpt/embed', a model's name, or 'auto'",
            param="model",
            code=_missing(model),
        )
    return _unicode(model, "model")


def _extension(payload: Mapping[str, Value]) -> Mapping[str, Value]:
    extension = payload.get("meshd")
    if extension is None:
        return {}
    if not isinstance(extension, Mapping):
        raise RequestError("`meshd` must be an object", param="meshd")
    for key in extension:  # ours alone: a misspelt `privacy` must not pass for none
        if key not in _EXTENSION:
            raise RequestError(
                f"`meshd.{key[:64]}` is unknown; there are {', '.join(_EXTENSION)}",
                param=f"meshd.{key[:64]}",
                code="unsupported_parameter",
            )
    return extension


def _truncate(payload: Mapping[str, Value]) -> bool:
    """Ours, in `meshd`; as a parameter of its own it is known from other servers."""
    extension = _extension(payload)
    return _boolean(extension, "truncate", "meshd.") or _boolean(payload, "truncate")


def _boolean(payload: Mapping[str, Value], name: str, within: str = "") -> bool:
    value = payload.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"`{within}{name}` must be true or false", param=f"{within}{name}")
    return value is True


def _integer(payload: Mapping[str, Value], name: str, most: int) -> int | None:
    value = payload.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise RequestError(f"`{name}` must be an integer from 1 to {most}", param=name)
    return value


def _unicode(text: str, param: str) -> str:
    """Raises RequestError: JSON can name half of a character, which no text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"`{param}` holds half of a character (a lone surrogate)", param=param
        ) from error
    return text


def _missing(value: Value) -> str:
    return "missing_required_parameter" if value is None else "invalid_type"
