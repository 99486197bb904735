"""Finds out what a server is and what models it has.

A survey is a few small requests, each within `ANSWER_S` and `ANSWER_BYTES_MAX`. What it says of a model beside
its being there is asked once, until its digest changes or the server was gone.

Sources of the shapes: Ollama docs/api.md; llama.cpp tools/server (server-context.cpp: get_res_models,
get_res_props); vLLM entrypoints/openai (ModelCard).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, assert_never

from meshd_plugins.api import Value
from meshd_plugins.builtin.adopt.client import Client, within
from meshd_plugins.builtin.adopt.config import Kind, ServerConfig
from meshd_plugins.builtin.adopt.errors import Broken, Denied, Loading, NotOurs
from meshd_plugins.builtin.adopt.models import ServedModel, looks_like_embedding
from meshd_plugins.builtin.adopt.tools import PROBE, Tools, tools_of
from meshd_plugins.builtin.adopt.untrusted import (
    clean,
    count,
    error_message,
    parse_json,
    rows,
    table,
)

ANSWER_S: Final = 5.0
ANSWER_BYTES_MAX: Final = (
    4 * 1024 * 1024
)  # /api/show holds licences, templates and sometimes a vocabulary
MODELS_MAX: Final = 32
ID_CHARS_MAX: Final = 200
OLLAMA_CONTEXT: Final = (
    4096  # what it serves unless told otherwise, whatever the model was trained with
)
SLOTS: Final[Mapping[Kind, int]] = {
    Kind.OLLAMA: 1,  # OLLAMA_NUM_PARALLEL cannot be asked for; 1 is its default, the rest it queues
    Kind.LLAMA_SERVER: 1,
    Kind.VLLM: 16,
    Kind.OPENAI: 1,  # some break an answer off when they are asked something else
}
"""Requests of one model at once, where neither the server nor the configuration says."""

MESHD_HEADER: Final = "x-meshd-request-id"
MESHD_OWNER: Final = "meshd"
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)([KMBT])")
_FACTORS: Final = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True, slots=True)
class Survey:
    """What a server is and has."""

    kind: Kind
    models: tuple[ServedModel, ...]
    slots: int  # requests of one model at once
    left_out: int = 0  # models beyond MODELS_MAX


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    value: Value  # None where the body was no JSON


class Surveyor:
    """Surveys one server again and again."""

    def __init__(self, client: Client, config: ServerConfig) -> None:
        self._client = client
        self._config = config
        self._kind = config.kind
        self._slots = 0  # as the server says
        self._known: dict[tuple[str, str], ServedModel] = {}  # by id and digest, as last described

    @property
    def kind(self) -> Kind:
        """What the server is, as far as it is known."""
        return self._kind

    def forget(self) -> None:
        """The server was gone: another one may come back in its place."""
        self._kind = self._config.kind
        self._known.clear()

    async def survey(self) -> Survey:
        """Ask what there is now.

        Raises:
            Unreachable, Broken, Slow, TooLarge: no proper answer.
            Denied, Loading, NotOurs: the answer was that.
        """
        if self._kind is Kind.AUTO:
            self._kind = await self._identify()
        kind = self._kind
        match kind:
            case Kind.OLLAMA:
                listed = await self._ollama()
            case Kind.LLAMA_SERVER:
                listed = await self._llama_server()
            case Kind.VLLM | Kind.OPENAI:
                listed = await self._openai()
            case Kind.AUTO:
                raise AssertionError("identified above")
            case _:
                assert_never(kind)
        wanted = tuple(model for model in listed if self._config.is_wanted(model.id))
        models = wanted[:MODELS_MAX]
        self._known = {(model.id, model.digest): model for model in models}
        slots = self._config.slots or self._slots or SLOTS[kind]
        return Survey(kind, models, slots, len(wanted) - len(models))

    # -- what it is ----------------------------------------------------------------------------------

    async def _identify(self) -> Kind:
        answer = await self._get("/v1/models")
        owners = {clean(row.get("owned_by")) for row in _data(answer.value)}
        listed = table(answer.value)
        if answer.status == 200 and isinstance(listed.get("data", ""), list | None):
            if answer.headers.get("server", "") == "llama.cpp" or "llamacpp" in owners:
                return Kind.LLAMA_SERVER
            if "vllm" in owners:
                return Kind.VLLM
            return Kind.OLLAMA if await self._is_ollama() else Kind.OPENAI
        if answer.status == 404 and await self._is_ollama():
            return Kind.OLLAMA
        raise NotOurs(f"{self._client.address} is no server that speaks OpenAI's API or Ollama's")

    async def _is_ollama(self) -> bool:
        answer = await self._get("/api/version")
        return answer.status == 200 and bool(clean(table(answer.value).get("version")))

    # -- what it has ---------------------------------------------------------------------------------

    async def _ollama(self) -> list[ServedModel]:
        tags = rows(_field(await self._good("/api/tags"), "models"), 4 * MODELS_MAX)
        loaded = {
            _id(row, "name"): count(row.get("context_length"))
            for row in rows(_field(await self._good("/api/ps"), "models"), 4 * MODELS_MAX)
        }
        found: list[ServedModel] = []
        for row in tags:
            name, digest = _id(row, "name"), clean(row.get("digest"), 80)
            if not name or not self._config.is_wanted(name):
                continue
            model = self._known.get((name, digest))
            if model is None and len(found) < MODELS_MAX:
                model = await self._shown(name, digest, row)
            if model is None:
                model = ServedModel(name, digest=digest)  # beyond what is announced: only counted
            is_warm = name in loaded
            found.append(
                replace(
                    model,
                    is_warm=is_warm,
                    context_tokens=loaded.get(name, 0)
                    or min(model.trained_tokens or OLLAMA_CONTEXT, OLLAMA_CONTEXT),
                )
            )
        return found

    async def _shown(self, name: str, digest: str, row: Mapping[str, Value]) -> ServedModel:
        """Put together what /api/tags and /api/show say of a model."""
        shown = table((await self._ask("POST", "/api/show", {"model": name})).value)
        info, details = table(shown.get("model_info")), table(row.get("details"))
        architecture = clean(info.get("general.architecture"), 40) or clean(
            details.get("family"), 40
        )
        told = shown.get("capabilities")
        said = set(told) if isinstance(told, list | tuple) and _are_texts(told) else set[Value]()
        pools = f"{architecture}.pooling_type" in info or "bert" in architecture
        embeds = "embedding" in said if said else pools or looks_like_embedding(name)
        generates = "completion" in said if said else not embeds
        template = shown.get("template")
        return ServedModel(
            id=name,
            chats=generates,
            completes=generates,
            embeds=embeds,
            digest=digest,
            architecture=architecture,
            parameters=count(info.get("general.parameter_count"))
            or _parameters(details.get("parameter_size")),
            quantisation=clean(details.get("quantization_level"), 20),
            size_bytes=count(row.get("size")),
            trained_tokens=count(info.get(f"{architecture}.context_length")),
            chat_template_digest=_digest(template),
            modalities=("text", "image") if "vision" in said else ("text",),
        )

    async def _llama_server(self) -> list[ServedModel]:
        listed = _data(await self._good("/v1/models"))
        props = table((await self._get("/props")).value)  # 501 or a key, where it is closed
        self._slots = min(count(props.get("total_slots")), 256)
        modalities = table(props.get("modalities"))
        seen = tuple(kind for kind in ("vision", "audio") if modalities.get(kind) is True)
        found: list[ServedModel] = []
        for row in listed:
            name = _id(row, "id")
            meta = table(row.get("meta"))
            known = self._known.get((name, ""))
            if known is not None and known.parameters == count(meta.get("n_params")):
                found.append(known)
                continue
            generation = table(props.get("default_generation_settings"))
            embeds = len(listed) == 1 and await self._embeds(name)
            only_embeds = embeds and looks_like_embedding(name)
            found.append(
                ServedModel(
                    id=name,
                    chats=not only_embeds,
                    completes=not only_embeds,
                    embeds=embeds,
                    parameters=count(meta.get("n_params")),
                    quantisation=_file_type(meta.get("ftype") or props.get("model_ftype")),
                    size_bytes=count(meta.get("size")),
                    trained_tokens=count(meta.get("n_ctx_train")),
                    context_tokens=count(meta.get("n_ctx")) or count(generation.get("n_ctx")),
                    chat_template_digest=_digest(props.get("chat_template")),
                    modalities=("text", *("image" if kind == "vision" else kind for kind in seen)),
                    tools=await self._tools(name) if len(listed) == 1 else Tools.UNKNOWN,
                )
            )
        return [model for model in found if model.id]

    async def _embeds(self, name: str) -> bool:
        """Whether a llama-server embeds: it only says when it is asked to."""
        answer = await self._ask("POST", "/v1/embeddings", {"model": name, "input": "a"})
        return answer.status == 200

    async def _tools(self, name: str) -> Tools:
        """Whether a llama-server tells its model of tools, as a prompt that it makes shows."""
        answer = await self._ask("POST", "/apply-template", {"model": name, **PROBE})
        return tools_of(answer.status, answer.value)

    async def _openai(self) -> list[ServedModel]:
        found: list[ServedModel] = []
        for row in _data(await self._good("/v1/models")):
            name = _id(row, "id")
            if not name or clean(row.get("owned_by")) == MESHD_OWNER:
                continue  # what a meshd lists stays in its mesh, also behind somebody's proxy
            embeds = looks_like_embedding(name)
            context = count(row.get("max_model_len")) or count(row.get("max_context_length"))
            found.append(
                ServedModel(
                    id=name,
                    chats=not embeds,
                    completes=not embeds,
                    embeds=embeds,
                    context_tokens=context,
                    trained_tokens=context,
                )
            )
        return found

    # -- asking ----------------------------------------------------------------------------------------

    async def _good(self, path: str) -> Value:
        """The value of an answer with status 200. Raises Broken."""
        answer = await self._get(path)
        if answer.status != 200 or not isinstance(answer.value, Mapping):
            raise Broken(f"{self._client.address}{path} answered {answer.status}")
        return answer.value

    async def _get(self, path: str) -> _Answer:
        return await self._ask("GET", path, None)

    async def _ask(self, method: str, path: str, body: Mapping[str, Value] | None) -> _Answer:
        raw = None if body is None else json.dumps(body).encode()
        with within(ANSWER_S, f"{self._client.address}{path}"):
            async with self._client.exchange(method, path, raw) as response:
                content = await response.read(ANSWER_BYTES_MAX)
        if MESHD_HEADER in response.headers:
            raise NotOurs(f"{self._client.address} is a meshd: adopting it would be a loop")
        if response.status in (401, 403):
            raise Denied(
                f"{self._client.address} wants a key: put it into a file and name it in api_key_file"
            )
        if response.status in (429, 503):
            raise Loading(f"{self._client.address} is starting or too busy: {_message(content)}")
        return _Answer(response.status, response.headers, _json_or_none(content))


def _message(content: bytes) -> str:
    return error_message(_json_or_none(content)) or "it says no more"


def _json_or_none(content: bytes) -> Value:
    try:
        return parse_json(content)
    except Broken:
        return None


def _field(value: Value, name: str) -> Value:
    return table(value).get(name)


def _data(value: Value) -> tuple[Mapping[str, Value], ...]:
    return rows(_field(value, "data"), 4 * MODELS_MAX)


def _id(row: Mapping[str, Value], key: str) -> str:
    """A model's id, which is sent back to its server: as it is or not at all."""
    value = row.get(key)
    fit = clean(value, ID_CHARS_MAX)
    return fit if fit == value else ""


def _are_texts(values: list[Value] | tuple[Value, ...]) -> bool:
    return all(isinstance(value, str) for value in values)


def _digest(template: Value) -> str:
    if not isinstance(template, str) or not template:
        return ""
    return hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()


def _parameters(value: Value) -> int:
    """Ollama's parameter_size: "7.2B"."""
    found = _SIZE.fullmatch(clean(value, 20))
    return int(float(found[1]) * _FACTORS[found[2]]) if found else 0


def _file_type(value: Value) -> str:
    """llama.cpp's words for a file type: "Q4_K - Medium", "all F32", "(guessed)" in front of some."""
    words = clean(value, 40).removeprefix("(guessed) ").removeprefix("all ").removeprefix("mostly ")
    return words.replace(" - Small", "_S").replace(" - Medium", "_M").replace(" - Large", "_L")[:20]
