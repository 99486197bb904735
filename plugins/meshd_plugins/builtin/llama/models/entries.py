r"""What the library knows of each model, and the small file in which it keeps that.

One description a model, `ID.model` beside the model files: a line with a checksum, then JSON. A damaged one
is found by its checksum and costs one model its names, and no other model anything.

    meshd-model 1 CHECKSUM\n
    {...}

CHECKSUM is blake2b-16 in hex over all that follows the line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from meshd_plugins.api import ModelFacts, PluginConfigError, Value
from meshd_plugins.builtin.llama.config import PACKAGE_PREFIX, ModelConfig, read_config
from meshd_plugins.builtin.llama.models.facts import facts_from_wire, facts_to_wire
from meshd_plugins.builtin.llama.models.kinds import Kind
from meshd_plugins.builtin.llama.models.pooling import Pooling

ID_LENGTH_MAX: Final = 63
DESCRIPTION_BYTES_MAX: Final = 64 * 1024
SOURCE_LENGTH_MAX: Final = 4096
NAME_DEFAULT: Final = "knowledge.gpt/general"
EMBED_DEFAULT: Final = "computation.gpt/embed"
RERANK_DEFAULT: Final = "computation.gpt/rerank"
OPTIONS: Final = ("path", "names", "sha256")
"""Keys of `config.ModelConfig` that an entry has fields for; all others are its options."""

_MAGIC: Final = b"meshd-model 1 "
_ID: Final = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{ID_LENGTH_MAX - 1}}}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class FlawedDescription(Exception):
    """These bytes are no description of a model. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the library.

    Attributes:
        id: short, unique on the node; also the stem of its files.
        path: what `config.ModelConfig.path` takes: an absolute path, or `pypi:PACKAGE`.
        kept: the file lies in the library's own folder and goes with the entry.
        sha256: of the file, hex.
        source: where it came from, as it was asked for; a hub's revision is pinned.
        facts: what its header says, read by a worker; None when the file was found without a description.
        kind: an adapter or a projector is served only with a model that names it.
        names: what it is announced as; none for what is no model, or was found without a description.
        options: further keys of `config.ModelConfig`, such as context and slots.
        added_at_s: unix time.
    """

    id: str
    path: str
    kept: bool
    sha256: str
    size_bytes: int
    source: str
    facts: ModelFacts | None
    kind: Kind
    names: tuple[str, ...]
    options: Mapping[str, Value] = field(default_factory=dict[str, Value])
    added_at_s: int = 0

    @property
    def served(self) -> bool:
        """Whether there is something to announce."""
        return bool(self.names) and self.kind is Kind.MODEL

    @property
    def uses(self) -> tuple[str, ...]:
        """Paths of the adapters and the projector that it is served with."""
        if not self.served:
            return ()
        config = self.config
        return (*(lora.path for lora in config.lora), *filter(None, (config.projector,)))

    @property
    def config(self) -> ModelConfig:
        """As the configuration would say it. Only of one that is `served`.

        Raises:
            PluginConfigError: an option is wrong.
        """
        return model_config(self.path, self.names, self.sha256, self.options)


def model_config(
    path: str, names: Sequence[str], sha256: str, options: Mapping[str, Value]
) -> ModelConfig:
    """A model as the configuration would say it. Raises PluginConfigError."""
    table: dict[str, Value] = {**options, "path": path, "names": list(names), "sha256": sha256}
    (config,) = read_config({"models": [table]})
    return config


def name_for(facts: ModelFacts, options: Mapping[str, Value]) -> str:
    """What a model is announced as when nobody says it: where `auto` looks for one of its kind."""
    pooling = options.get("pooling") or facts.pooling
    if pooling == Pooling.RANK:
        return RERANK_DEFAULT
    return EMBED_DEFAULT if pooling or options.get("embeddings") is True else NAME_DEFAULT


def slug(text: str) -> str:
    """A text as an id: small letters, digits, `.`, `_` and `-`. "model" when nothing is left of it."""
    kept = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return kept[:ID_LENGTH_MAX].rstrip("-._") or "model"


def is_id(text: str) -> bool:
    """Whether it can be an id."""
    return _ID.fullmatch(text) is not None


def config_ids(models: Sequence[ModelConfig]) -> tuple[str, ...]:
    """The ids of models from the configuration: from their files' names, each once, in their order."""
    ids: list[str] = []
    for model in models:
        wanted = slug(Path(model.path.removeprefix(PACKAGE_PREFIX)).name.removesuffix(".gguf"))
        ids.append(free_id(wanted, ids))
    return tuple(ids)


def free_id(wanted: str, taken: Sequence[str]) -> str:
    """The wanted id, or with the first number that makes it free."""
    found, number = wanted, 2
    while found in taken:
        suffix = f"-{number}"
        found = wanted[: ID_LENGTH_MAX - len(suffix)] + suffix
        number += 1
    return found


# -- the description ----------------------------------------------------------------------------------------


def enclose(entry: Entry) -> bytes:
    """The bytes of a description."""
    raw: dict[str, Any] = {
        "id": entry.id,
        "path": entry.path,
        "kept": entry.kept,
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "source": entry.source,
        "facts": None if entry.facts is None else facts_to_wire(entry.facts),
        "kind": entry.kind.value,
        "names": list(entry.names),
        "options": dict(entry.options),
        "added_at_s": entry.added_at_s,
    }
    content = json.dumps(raw, indent=1, ensure_ascii=False).encode() + b"\n"
    return _MAGIC + _checksum(content) + b"\n" + content


def disclose(data: bytes) -> Entry:
    """What a description says.

    Raises:
        FlawedDescription: it is not one, or not as it was written; nothing else on any bytes.
    """
    line, _, content = data.partition(b"\n")
    if len(data) > DESCRIPTION_BYTES_MAX or line != _MAGIC + _checksum(content):
        raise FlawedDescription("its checksum does not fit")
    try:
        return _entry(json.loads(content))
    except (ValueError, TypeError, LookupError, RecursionError, PluginConfigError) as error:
        raise FlawedDescription(f"{type(error).__name__}: {error}") from error


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


def _entry(raw: Any) -> Entry:
    """Checked in full: a folder may have come from another machine, or from a later release."""
    sha256, options = _of(str, raw["sha256"]), cast("dict[str, Value]", _of(dict, raw["options"]))
    if not _DIGEST.fullmatch(sha256) or not is_id(_of(str, raw["id"])):
        raise ValueError("id or digest")
    facts = None if raw["facts"] is None else facts_from_wire(raw["facts"], sha256)
    entry = Entry(
        id=raw["id"],
        path=_of(str, raw["path"]),
        kept=_of(bool, raw["kept"]),
        sha256=sha256,
        size_bytes=_of(int, raw["size_bytes"]),
        source=_of(str, raw["source"]),
        facts=facts,
        kind=Kind(_of(str, raw["kind"])),
        names=tuple(_of(str, name) for name in raw["names"]),
        options=options,
        added_at_s=_of(int, raw["added_at_s"]),
    )
    if entry.served:
        _ = entry.config
    return entry


def _of(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value
