"""The table [plugins.llama], checked."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from meshd_plugins.api import PluginConfigError, Value
from meshd_plugins.builtin.llama.models.pooling import CHOICES as POOLINGS
from meshd_plugins.builtin.llama.split.config import read_split
from meshd_plugins.tables import read_boolean, read_choice, read_integer, reject_unknown

PACKAGE_PREFIX: Final = "pypi:"
MODELS_MAX: Final = 32
SHARED_PROMPTS_MAX: Final = 16
PROMPT_CHARACTERS: Final = 16_000  # they travel on a command line
SLOTS_MAX: Final = 64
BATCH_TOKENS_MAX: Final = 4096
LORA_MAX: Final = 8
HUB_URL_DEFAULT: Final = "https://huggingface.co"
KNOWN: Final = (
    "models",
    "hub_url",
    "disk_mib_max",
    "memory_mib_max",
    "reserve_mib",
    "residency_min_s",
    "rpc",
)
"""Keys of the table."""

LIBRARY: Final = ("llama_cpp", "jinja2")
INSTALL_HINT: Final = "pip install 'edge-meshd[llama]'"


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """One adapter of a model."""

    path: str  # absolute: a GGUF file made for that very model
    scale: float = 1.0  # how much of it; 0.0: nothing
    sha256: str = ""  # as of a model


@dataclass(frozen=True, slots=True)
class Limits:
    """What all models of the node share."""

    memory_mib_max: int = (
        0  # of all loaded models together; 0: what the machine has, less `reserve`
    )
    reserve_mib: int = 0  # left free for everything else; 0: a tenth of the machine, 256 at least
    residency_min_s: int = 30
    """A loaded model is not unloaded for another one before that: else two models in turn would spend all
    time loading. Up: fewer loads, longer refusals."""


@dataclass(frozen=True, slots=True)
class LibraryConfig:
    """Of the models that `meshd model add` fetches."""

    hub_url: str = HUB_URL_DEFAULT  # where hf:OWNER/REPO/FILE is: the hub itself, or a mirror of it
    disk_mib_max: int = 0  # of all fetched models together; 0: what the disk has, less a reserve


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One entry of `models`."""

    path: str  # absolute, or "pypi:PACKAGE": the GGUF file inside an installed package
    names: tuple[str, ...]  # what it is announced as, at least one
    context: int = 4096
    """Tokens of one request, prompt and answer; memory grows with it, times slots. 0: as much as the model
    was trained with and the memory holds."""
    slots: int = 0  # requests served at once; each reserves the memory of one context; 0: 1 to 4
    threads: int = 0  # 0: one a physical core, of the fast ones where cores differ
    batch: int = 0  # tokens of one step at most; more: faster prompts, more memory; 0: 512
    chunk: int = 0  # prompt tokens of one step while others generate; 0: what takes 0.4 s
    prefix_cache_mib: int = 256
    """What conversations may take that are kept computed beside the slots' own; 0: none. Raising it: more
    conversations go on without their prompt being computed again."""
    shared_prompts: tuple[str, ...] = ()
    """System messages that many send. What is computed of one serves every caller; of anything else, only
    the caller whose it was: how soon an answer begins would tell what others ask."""
    gpu_layers: int = -1  # layers put on the GPU, where the build has one; -1: what fits
    flash_attention: str = "auto"  # on, off, or auto: what llama.cpp chooses for the device
    keep: str = ""
    """"loaded": from the start on, never unloaded. "demand": loaded by the first request, unloaded when
    idle. "": loaded at the start where there is room, unloaded only when another model needs the room."""
    idle_unload_s: int = 600  # of a model on demand: idle for so long, it is unloaded; 0: never
    lora: tuple[LoraConfig, ...] = ()  # adapters put on it, all of them always
    projector: str = ""
    """Absolute, or "pypi:PACKAGE": a GGUF file (mmproj) with which the model reads pictures or sounds too; "": text
    only."""
    projector_sha256: str = ""  # as of the model
    embeddings: bool = False
    """Make vectors of texts instead of writing. A model that can do nothing else does it anyway."""
    pooling: str = ""  # mean, cls, last or rank (scores for documents); "": what the file says
    family: str = ""  # what people call it; "": from the file's name
    memory_mib_max: int = 0  # resident memory at which the worker is ended; 0: no limit of its own
    start_deadline_s: int = 120  # from start to ready; a large model on a slow card needs minutes
    sha256: str = ""  # of the file, hex: another one is not loaded; "": whatever lies there is
    privacy: str = "mesh"  # the widest distance from which it may be called: local, lan or mesh
    split: tuple[str, ...] = ()
    """Names of the nodes that hold layers of it beside this one, or "auto": near ones that offer memory, as
    many as it takes. Empty: this node holds it all."""


def read_config(table: Mapping[str, Value]) -> tuple[ModelConfig, ...]:
    """Check the models of the table; none configured is no error. Raises PluginConfigError."""
    reject_unknown(table, KNOWN, "plugins.llama")
    models = table.get("models", ())
    if (
        not isinstance(models, Sequence)
        or isinstance(models, str | bytes)
        or len(models) > MODELS_MAX
    ):
        raise PluginConfigError(
            f"plugins.llama.models must be a list of at most {MODELS_MAX} tables"
        )
    configs = tuple(
        _read_model(entry, f"plugins.llama.models[{n}]") for n, entry in enumerate(models)
    )
    seen: set[tuple[str, str]] = set()
    for config in configs:
        for name in config.names:
            if (config.path, name) in seen:
                raise PluginConfigError(
                    f"plugins.llama.models: {config.path} has the name {name} twice"
                )
            seen.add((config.path, name))
    return configs


def read_limits(table: Mapping[str, Value]) -> Limits:
    """Check what all models share. Raises PluginConfigError."""
    where = "plugins.llama"
    return Limits(
        memory_mib_max=_integer(table, "memory_mib_max", where, 0, 2**31, Limits),
        reserve_mib=_integer(table, "reserve_mib", where, 0, 2**31, Limits),
        residency_min_s=_integer(table, "residency_min_s", where, 0, 86_400, Limits),
    )


def read_library(table: Mapping[str, Value]) -> LibraryConfig:
    """Check what is about fetched models. Raises PluginConfigError."""
    hub_url = table.get("hub_url", HUB_URL_DEFAULT)
    if not isinstance(hub_url, str) or not re.fullmatch(r"https?://[^/?#\s@]+[^?#\s@]*", hub_url):
        raise PluginConfigError(
            f"plugins.llama.hub_url is {hub_url!r}: give an address like {HUB_URL_DEFAULT}"
        )
    disk_mib_max = _integer(table, "disk_mib_max", "plugins.llama", 0, 2**31, LibraryConfig)
    return LibraryConfig(hub_url, disk_mib_max)


def _read_model(entry: Value, where: str) -> ModelConfig:
    if not isinstance(entry, Mapping):
        raise PluginConfigError(
            f'{where} must be a table like {{path = "/x.gguf", names = ["..."]}}'
        )
    reject_unknown(entry, tuple(field.name for field in fields(ModelConfig)), where)
    path = entry.get("path")
    if not isinstance(path, str) or not _is_place(path):
        raise PluginConfigError(f"{where}.path is {path!r}: give an absolute path, or pypi:PACKAGE")
    names = entry.get("names")
    if (
        not isinstance(names, Sequence)
        or isinstance(names, str | bytes)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise PluginConfigError(
            f'{where}.names is {names!r}: give a list like ["knowledge.gpt/general"]'
        )
    family, privacy = entry.get("family", ""), entry.get("privacy", "mesh")
    if not isinstance(family, str) or len(family) > 80:
        raise PluginConfigError(f"{where}.family must be a string of at most 80 characters")
    if privacy not in ("local", "lan", "mesh"):
        raise PluginConfigError(f"{where}.privacy is {privacy!r}: one of local, lan, mesh")
    return ModelConfig(
        path=path,
        names=tuple(str(name) for name in names),
        context=_integer(entry, "context", where, 0, 1_048_576),
        slots=_integer(entry, "slots", where, 0, SLOTS_MAX),
        threads=_integer(entry, "threads", where, 0, 1024),
        prefix_cache_mib=_integer(entry, "prefix_cache_mib", where, 0, 1 << 20),
        batch=_integer(entry, "batch", where, 0, BATCH_TOKENS_MAX),
        chunk=_integer(entry, "chunk", where, 0, BATCH_TOKENS_MAX),
        flash_attention=_choice(entry, "flash_attention", where, ("auto", "on", "off")),
        keep=_choice(entry, "keep", where, ("", "loaded", "demand")),
        idle_unload_s=_integer(entry, "idle_unload_s", where, 0, 31_536_000),
        lora=_read_lora(entry.get("lora", ()), f"{where}.lora"),
        projector=_projector(entry, where),
        projector_sha256=_digest(entry, where, "projector_sha256"),
        shared_prompts=_texts(entry, "shared_prompts", where),
        gpu_layers=_integer(entry, "gpu_layers", where, -1, 10_000),
        embeddings=read_boolean(entry, "embeddings", where, default=False),
        pooling=_choice(entry, "pooling", where, POOLINGS),
        family=family,
        memory_mib_max=_integer(entry, "memory_mib_max", where, 0, 2**31),
        start_deadline_s=_integer(entry, "start_deadline_s", where, 1, 3600),
        sha256=_digest(entry, where),
        privacy=str(privacy),
        split=read_split(entry, where),
    )


def _read_lora(value: Value, where: str) -> tuple[LoraConfig, ...]:
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str | bytes)
        or len(value) > LORA_MAX
        or not all(isinstance(entry, Mapping) for entry in value)
    ):
        raise PluginConfigError(
            f'{where} must be a list of at most {LORA_MAX} tables like {{path = "/a.gguf", scale = 1.0}}'
        )
    adapters: list[LoraConfig] = []
    for number, entry in enumerate(value):
        assert isinstance(entry, Mapping)
        here = f"{where}[{number}]"
        reject_unknown(entry, tuple(field.name for field in fields(LoraConfig)), here)
        path, scale = entry.get("path"), entry.get("scale", 1.0)
        if not isinstance(path, str) or not Path(path).is_absolute():
            raise PluginConfigError(f"{here}.path is {path!r}: give an absolute path")
        if (
            isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not -100 <= scale <= 100
        ):
            raise PluginConfigError(f"{here}.scale is {scale!r}: a number from -100 to 100")
        adapters.append(LoraConfig(path, float(scale), _digest(entry, here)))
    return tuple(adapters)


def _projector(entry: Mapping[str, Value], where: str) -> str:
    path = entry.get("projector", "")
    if not isinstance(path, str) or not (not path or _is_place(path)):
        raise PluginConfigError(
            f"{where}.projector is {path!r}: give an absolute path, or pypi:PACKAGE"
        )
    if entry.get("projector_sha256") and not path:
        raise PluginConfigError(
            f"{where}.projector_sha256 is the digest of no projector: give its path"
        )
    if path and (entry.get("embeddings") or entry.get("pooling")):
        raise PluginConfigError(
            f"{where} makes vectors of texts, and has a projector, which is for models that write: take one away"
        )
    if path and entry.get("split"):
        raise PluginConfigError(
            f"{where} is split, and has a projector: a split model reads text only; take one away"
        )
    return path


def _is_place(path: str) -> bool:
    """Whether a configured path can be found, wherever the daemon stands."""
    return path.startswith(PACKAGE_PREFIX) or Path(path).is_absolute()


def _digest(entry: Mapping[str, Value], where: str, name: str = "sha256") -> str:
    sha256 = entry.get(name, "")
    if not isinstance(sha256, str) or not re.fullmatch(r"([0-9a-fA-F]{64})?", sha256):
        raise PluginConfigError(
            f"{where}.{name} is {sha256!r}: give the 64 hexadecimal digits that sha256sum prints"
        )
    return sha256.lower()


def _choice(entry: Mapping[str, Value], name: str, where: str, choices: Sequence[str]) -> str:
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    return read_choice(entry, name, where, choices, default=str(defaults[name]))


def _texts(entry: Mapping[str, Value], name: str, where: str) -> tuple[str, ...]:
    value = entry.get(name, ())
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str | bytes)
        or len(value) > SHARED_PROMPTS_MAX
        or not all(isinstance(text, str) and 0 < len(text) <= PROMPT_CHARACTERS for text in value)
    ):
        raise PluginConfigError(
            f"{where}.{name}: give a list of at most {SHARED_PROMPTS_MAX} texts of 1 to "
            f"{PROMPT_CHARACTERS} characters"
        )
    return tuple(str(text) for text in value)


def _integer(
    entry: Mapping[str, Value],
    name: str,
    where: str,
    least: int,
    most: int,
    table: type[ModelConfig | Limits | LibraryConfig] = ModelConfig,
) -> int:
    defaults = {field.name: field.default for field in fields(table)}
    default = defaults[name]
    assert isinstance(default, int), "every field that is read so has one"
    return read_integer(entry, name, where, least, most, default=default)


def require_library() -> None:
    """Check, without loading it, that the library is there. Raises PluginConfigError."""
    for module in LIBRARY:
        if importlib.util.find_spec(module) is None:
            raise PluginConfigError(
                f"plugins.llama needs {module}, which is not installed: {INSTALL_HINT}"
            )


def is_library_there() -> bool:
    """Whether models can be run at all."""
    return all(importlib.util.find_spec(module) is not None for module in LIBRARY)


def locate_model(path: str) -> Path:
    """Return the file that a configured path means. Raises PluginConfigError.

    The package is found, not imported: importing it would run its code in the daemon.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path)
    package = path.removeprefix(PACKAGE_PREFIX).replace("-", "_")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if spec is None:
        raise PluginConfigError(
            f"plugins.llama: {path}: no such package is installed: pip install {package.replace('_', '-')}"
        )
    if len(files) != 1:
        raise PluginConfigError(
            f"plugins.llama: {path}: the package holds {len(files)} GGUF files, not one"
        )
    return files[0]
