"""The table [plugins.adopt], checked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from meshd_plugins.api import PluginConfigError, Privacy, Value
from meshd_plugins.media import Modality
from meshd_plugins.tables import read_boolean, read_integer, read_number, reject_unknown

SERVERS_MAX: Final = 16
SLOTS_MAX: Final = 256
WELL_KNOWN_PORTS: Final = (11434, 8080, 8000, 1234)
"""Where Ollama, llama-server, vLLM and LM Studio listen unless told otherwise."""

_NAME: Final = re.compile(r"(knowledge|data|computation)\.gpt(/[a-z0-9][a-z0-9_.-]*)+")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Kind(StrEnum):
    """What a server is."""

    AUTO = "auto"
    OLLAMA = "ollama"
    LLAMA_SERVER = "llama-server"
    VLLM = "vllm"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is: what its URL says."""

    scheme: str  # http or https
    host: str  # without brackets
    port: int
    path: str = ""  # before every path asked for; "" or "/x"

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine, as far as the URL can tell; who connects checks it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def authority(self) -> str:
        """Host and port, as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One entry of `servers`."""

    url: Address
    kind: Kind = Kind.AUTO
    names: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Patterns of models, each with what they are announced as. The first that matches counts; a model that none
    matches is knowledge.gpt/general, or computation.gpt/embed where it embeds."""
    models: tuple[str, ...] = ("*",)  # patterns of what is adopted
    modalities: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Patterns of models, each with what they take in beside text. The first that matches counts; a model that
    none matches takes in what its server says."""
    api_key_file: str = ""  # its first line goes into the Authorization header
    ca_file: str = ""  # PEM, for https; "": the system's authorities
    slots: int = 0  # requests of one model at once; 0: as the server says, or by its kind
    context: int = 0  # tokens of one request; 0: as the server says
    privacy: Privacy | None = None  # None: mesh on this machine, cloud elsewhere
    measure: bool = True  # one short request at adoption, where it would not load a model
    poll_s: float = 5.0  # between two looks. Up: asks less, and learns later that a server died
    first_token_s: float = 120.0  # for a first token, loading the model included
    between_tokens_s: float = 30.0

    @property
    def privacy_class(self) -> Privacy:
        """From how far away it may be used. What goes to another machine has left the mesh."""
        if self.privacy is not None:
            return self.privacy
        return Privacy.MESH if self.url.is_loopback else Privacy.CLOUD

    def is_wanted(self, model: str) -> bool:
        """Whether a model is to be adopted."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def names_of(self, model: str, default: str) -> tuple[str, ...]:
        """What a model is announced as."""
        for pattern, names in self.names:
            if fnmatchcase(model, pattern):
                return names
        return (default,)

    def modalities_of(self, model: str, told: tuple[str, ...]) -> tuple[str, ...]:
        """What a model takes in; `told` by its server."""
        for pattern, modalities in self.modalities:
            if fnmatchcase(model, pattern):
                return (Modality.TEXT, *modalities)
        return told


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole table."""

    servers: tuple[ServerConfig, ...] = ()
    probe: bool = True  # look for servers on this machine
    ports: tuple[int, ...] = WELL_KNOWN_PORTS  # where

    def probed(self) -> tuple[ServerConfig, ...]:
        """A server for each port to look at that is not configured."""
        if not self.probe:
            return ()
        known = {server.url.port for server in self.servers if server.url.is_loopback}
        return tuple(
            ServerConfig(Address("http", "127.0.0.1", port))
            for port in self.ports
            if port not in known
        )


def read_settings(table: Mapping[str, Value]) -> Settings:
    """Check the table; none configured is no error. Raises PluginConfigError."""
    reject_unknown(table, ("servers", "probe", "ports"), "plugins.adopt")
    servers = table.get("servers", ())
    if (
        not isinstance(servers, Sequence)
        or isinstance(servers, str | bytes)
        or len(servers) > SERVERS_MAX
    ):
        raise PluginConfigError(
            f"plugins.adopt.servers must be a list of at most {SERVERS_MAX} tables"
        )
    read = tuple(
        _read_server(entry, f"plugins.adopt.servers[{number}]")
        for number, entry in enumerate(servers)
    )
    seen = [str(server.url) for server in read]
    twice = [url for url in seen if seen.count(url) > 1]
    if twice:
        raise PluginConfigError(f"plugins.adopt.servers names {twice[0]} twice: once is enough")
    return Settings(
        read, read_boolean(table, "probe", "plugins.adopt", default=True), _ports(table)
    )


def read_address(url: Value, where: str) -> Address:
    """Take a URL apart. Raises PluginConfigError."""
    wanted = f'{where}.url is {url!r}: give one like "http://127.0.0.1:11434"'
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        raise PluginConfigError(wanted)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise PluginConfigError(f"{wanted} ({error})") from error
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or parts.query or parts.fragment:
        raise PluginConfigError(wanted)
    if parts.username is not None or parts.password is not None:
        raise PluginConfigError(f"{where}.url holds a password: put the key into api_key_file")
    if not url.isascii():
        raise PluginConfigError(wanted)
    path = parts.path.rstrip("/").removesuffix("/v1")  # as OpenAI's clients want it, or without
    return Address(parts.scheme, parts.hostname, port or _DEFAULT_PORTS[parts.scheme], path)


def _read_server(entry: Value, where: str) -> ServerConfig:
    if not isinstance(entry, Mapping):
        raise PluginConfigError(f'{where} must be a table like {{url = "http://127.0.0.1:11434"}}')
    reject_unknown(entry, tuple(field.name for field in fields(ServerConfig)), where)
    kinds = [str(kind) for kind in Kind]
    kind = entry.get("kind", "auto")
    if kind not in kinds:
        raise PluginConfigError(f"{where}.kind is {kind!r}: one of {', '.join(kinds)}")
    classes = [level.name.lower() for level in Privacy]
    privacy = entry.get("privacy")
    if privacy is not None and privacy not in classes:
        raise PluginConfigError(f"{where}.privacy is {privacy!r}: one of {', '.join(classes)}")
    return ServerConfig(
        url=read_address(entry.get("url"), where),
        kind=Kind(str(kind)),
        names=_names(entry.get("names", {}), f"{where}.names"),
        models=_texts(entry.get("models", ["*"]), f"{where}.models"),
        modalities=_modalities(entry.get("modalities", {}), f"{where}.modalities"),
        api_key_file=_path(entry, "api_key_file", where),
        ca_file=_path(entry, "ca_file", where),
        slots=int(_number(entry, "slots", where, 0, SLOTS_MAX)),
        context=int(_number(entry, "context", where, 0, 2**31)),
        privacy=None if privacy is None else Privacy[str(privacy).upper()],
        measure=read_boolean(entry, "measure", where, default=True),
        poll_s=_number(entry, "poll_s", where, 0.05, 3600),
        first_token_s=_number(entry, "first_token_s", where, 0.05, 3600),
        between_tokens_s=_number(entry, "between_tokens_s", where, 0.05, 3600),
    )


def _names(value: Value, where: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(value, Mapping):
        raise PluginConfigError(
            f'{where} must be a table like {{ "llama3*" = ["knowledge.gpt/general"] }}'
        )
    found: list[tuple[str, tuple[str, ...]]] = []
    for pattern, names in value.items():
        listed = _texts([names] if isinstance(names, str) else names, f"{where}.{pattern}")
        for name in listed:
            if not _NAME.fullmatch(name):
                raise PluginConfigError(
                    f"{where}.{pattern}: {name!r} is no name; give one like knowledge.gpt/code"
                )
        found.append((pattern, listed))
    return tuple(found)


def _modalities(value: Value, where: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(value, Mapping):
        raise PluginConfigError(f'{where} must be a table like {{ "*-vl-*" = ["image"] }}')
    known = (Modality.IMAGE, Modality.AUDIO)
    found: list[tuple[str, tuple[str, ...]]] = []
    for pattern, modalities in value.items():
        listed = modalities if isinstance(modalities, list | tuple) else None
        if listed is None or not all(each in known for each in listed):
            raise PluginConfigError(
                f"{where}.{pattern} is {modalities!r}: give a list of {' and '.join(known)}, or an empty one"
            )
        found.append((pattern, tuple(each for each in known if each in listed)))
    return tuple(found)


def _texts(value: Value, where: str) -> tuple[str, ...]:
    texts = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise PluginConfigError(f"{where} is {value!r}: give a list of texts that is not empty")
    return tuple(dict.fromkeys(str(text) for text in texts))


def _path(entry: Mapping[str, Value], name: str, where: str) -> str:
    value = entry.get(name, "")
    if not isinstance(value, str) or (value and not Path(value).is_absolute()):
        raise PluginConfigError(f"{where}.{name} is {value!r}: give an absolute path")
    return value


def _number(entry: Mapping[str, Value], name: str, where: str, least: float, most: float) -> float:
    default = {field.name: field.default for field in fields(ServerConfig)}[name]
    if isinstance(default, int):
        return read_integer(entry, name, where, int(least), int(most), default=default)
    assert isinstance(default, float), "every field that is read so has one"
    return read_number(entry, name, where, least, most, default=default)


def _ports(table: Mapping[str, Value]) -> tuple[int, ...]:
    value = table.get("ports", WELL_KNOWN_PORTS)
    ports = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    found = [port for port in ports if isinstance(port, int) and not isinstance(port, bool)]
    if not 0 < len(found) == len(ports) <= SERVERS_MAX or not all(0 < p < 65536 for p in found):
        raise PluginConfigError(
            f"plugins.adopt.ports is {value!r}: give a list of 1 to {SERVERS_MAX} ports"
        )
    return tuple(dict.fromkeys(found))
