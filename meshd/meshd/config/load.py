"""Reads the configuration: defaults, then files, then the environment, then options; the last one wins.

Files: those given, else the one that MESHD_CONFIG names, else /etc/meshd/meshd.toml where it exists.
Environment: MESHD_<SECTION>_<KEY>, such as MESHD_HTTP_PORT=0. Options: "section.key" to a value.

Whatever is wrong is a `ConfigError` with one sentence: where, which key, and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from meshd.config import gossip
from meshd.config.access import BadRule, access_rules, rule_line
from meshd.config.errors import BadValue, ConfigError, ConfigSyntax, ConfigUnreadable, UnknownKey
from meshd.config.fields import about_of, kind_of
from meshd.config.machine import Machine
from meshd.config.redaction import REDACTED, is_secret_name
from meshd.config.sections import SECTIONS, Config, Preset
from meshd.config.values import Unsuitable, convert, passed_through, read_toml_value
from meshd_plugins.api import Value

FILE_BYTES_MAX = 1_048_576
OWN_CERTIFICATE = "made by the daemon"
"""The origin of `http.certificate` and `http.key` where nobody gave them."""
SOCKET_PATH_BYTES_MAX = 107  # sun_path of Linux, less its closing NUL

_SHOWN_CHARS_MAX = 60
_CONFIG_VARIABLE = "MESHD_CONFIG"
_VARIABLE_PREFIX = "MESHD_"


@dataclass(frozen=True, slots=True)
class _Given:
    """One value as somebody gave it."""

    section: str
    key: str
    raw: object
    origin: str
    base: Path
    text: bool


def load(
    paths: Sequence[Path] = (),
    *,
    overrides: Mapping[str, object] | None = None,
    machine: Machine | None = None,
) -> Config:
    """The configuration in force.

    `overrides` maps "section.key" to a value of the field's type or to its text, as from the command
    line. Raises ConfigError; nothing is left behind.
    """
    machine = machine or Machine.here()
    settled: dict[str, dict[str, object]] = {name: {} for name in SECTIONS}
    origins: dict[str, str] = {}
    given = [
        *(item for path in config_paths(paths, machine) for item in _from_file(path)),
        *_from_environment(machine.environment),
        *_from_overrides(overrides or {}),
    ]
    for item in given:
        _settle(item, settled, origins)
    config = _built(settled, origins)
    config = _with_derived(config, machine)
    _check_relations(config)
    return config


def config_paths(paths: Sequence[Path], machine: Machine) -> tuple[Path, ...]:
    """The files that `load` reads, in order. A file that was named must exist; the system's need not."""
    if paths:
        return tuple(paths)
    named = machine.environment.get(_CONFIG_VARIABLE, "")
    if named:
        return (Path(named),)
    return (machine.system_config,) if machine.system_config.exists() else ()


def socket_candidates(config: Config, machine: Machine | None = None) -> tuple[Path, ...]:
    """Where a client looks for the daemon: the configured socket; if that is a default, the service's too."""
    machine = machine or Machine.here()
    system = machine.system_runtime_dir / "meshd.sock"
    if "http.socket" in config.origins and config.origins["http.socket"] not in _WEAK_ORIGINS:
        return (config.http.socket,)
    return tuple(dict.fromkeys((config.http.socket, system)))


_WEAK_ORIGINS = frozenset({"default", "XDG_RUNTIME_DIR"})


def _from_file(path: Path) -> Iterator[_Given]:
    document = _read_document(path)
    base = path.parent.absolute()
    for section, table in document.items():
        if section not in SECTIONS:
            raise _unknown_section(section, str(path))
        if not isinstance(table, Mapping):
            raise BadValue(
                f"{section} is a section: write [{section}] on a line of its own, and its keys below",
                origin=str(path),
                key=section,
            )
        for key, raw in cast("Mapping[str, object]", table).items():
            yield _Given(section, key, raw, str(path), base, text=False)


def _read_document(path: Path) -> Mapping[str, object]:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigUnreadable(f"cannot be read: {reason}", origin=str(path)) from error
    if len(content) > FILE_BYTES_MAX:
        raise ConfigUnreadable(f"is larger than {FILE_BYTES_MAX} bytes", origin=str(path))
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise ConfigSyntax(
            f"not valid TOML: not UTF-8 text (at line {line}, column {column})", origin=str(path)
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error).replace(
            "at end of document", f"at line {text.count(chr(10)) + 1}, the end of the file"
        )
        raise ConfigSyntax(f"not valid TOML: {message}", origin=str(path)) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, a tower of brackets
        raise ConfigSyntax(
            "not usable TOML: a value is far too long or too deep", origin=str(path)
        ) from error


def _from_environment(environment: Mapping[str, str]) -> Iterator[_Given]:
    for variable in sorted(environment):
        if not variable.startswith(_VARIABLE_PREFIX) or variable == _CONFIG_VARIABLE:
            continue
        section, _, key = variable.removeprefix(_VARIABLE_PREFIX).lower().partition("_")
        origin = f"environment variable {variable}"
        if section not in SECTIONS:
            # Other programs may have variables of their own here; a slip of the pen is refused.
            if key and difflib.get_close_matches(section, SECTIONS, 1, 0.75):
                raise _unknown_section(section, origin)
            continue
        yield _Given(section, key, environment[variable], origin, Path.cwd(), text=True)


def _from_overrides(overrides: Mapping[str, object]) -> Iterator[_Given]:
    for dotted, raw in overrides.items():
        section, _, key = dotted.partition(".")
        if section not in SECTIONS:
            raise _unknown_section(section, "command line")
        yield _Given(section, key, raw, "command line", Path.cwd(), text=True)


def _settle(item: _Given, settled: dict[str, dict[str, object]], origins: dict[str, str]) -> None:
    """Check one value and put it where it belongs."""
    section = SECTIONS[item.section]
    fields = {field.name: field for field in dataclasses.fields(section)}
    if item.section == "plugins" and (item.key == "tables" or item.key not in fields):
        _settle_plugin(item, settled["plugins"], origins)
        return
    key, _, inner = item.key.partition(".")
    if key not in fields:
        raise _unknown_key(item, list(fields))
    kind = kind_of(fields[key])
    if inner and kind is not dict:
        raise _unknown_key(item, list(fields))
    raw = {inner: _option_value(item)} if inner else item.raw
    try:
        value = convert(raw, kind, about_of(fields[key].metadata), base=item.base, text=item.text)
    except Unsuitable as error:
        raise _bad_value(item, str(error)) from error
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Value]", value)
        value = {**cast("Mapping[str, Value]", settled[item.section].get(key, {})), **table}
        origins.update({f"{item.section}.{key}.{name}": item.origin for name in table})
    settled[item.section][key] = value
    origins[f"{item.section}.{key}"] = item.origin


def _settle_plugin(item: _Given, settled: dict[str, object], origins: dict[str, str]) -> None:
    """A table [plugins.NAME], or one key of it; a later source replaces single keys."""
    name, _, key = item.key.partition(".")
    if not item.text:
        name, key = item.key, ""  # a file's own dots are tables already
    raw = {key: _option_value(item)} if key else item.raw
    if not isinstance(raw, Mapping):
        near = _nearest(name, ["enable", "disable"])
        hint = (
            f'did you mean "{near}"?'
            if near
            else f"a plugin's settings are a table, [plugins.{name}]"
        )
        raise UnknownKey(
            f'unknown key "{name}" in [plugins]; {hint}',
            origin=item.origin,
            key=name,
            suggestion=near,
        )
    try:
        table = passed_through(cast("object", raw))
    except Unsuitable as error:
        raise _bad_value(item, str(error)) from error
    tables = dict(cast("Mapping[str, Mapping[str, Value]]", settled.get("tables", {})))
    tables[name] = {**tables.get(name, {}), **table}
    settled["tables"] = tables
    origins.update({f"plugins.{name}.{inner}": item.origin for inner in table})


def _option_value(item: _Given) -> object:
    return read_toml_value(item.raw) if item.text and isinstance(item.raw, str) else item.raw


def _built(settled: Mapping[str, Mapping[str, object]], origins: Mapping[str, str]) -> Config:
    """The sections from checked values: `convert` has seen to the types that the checker cannot."""
    sections = {
        name: cast("Callable[..., object]", section)(**settled[name])
        for name, section in SECTIONS.items()
    }
    return cast("Callable[..., Config]", Config)(**sections, origins=origins)


def _with_derived(config: Config, machine: Machine) -> Config:
    """Fill in the defaults that depend on the machine or on other settings."""
    origins = dict(config.origins)
    node, discovery, http = config.node, config.discovery, config.http
    if "node.name" not in origins:
        node = replace(node, name=machine.default_node_name())
        origins["node.name"] = "host name"
    state_dir_given = "node.state_dir" in origins
    if not state_dir_given:
        state_dir, origins["node.state_dir"] = machine.default_state_dir()
        node = replace(node, state_dir=state_dir)
    if "http.socket" not in origins:
        socket, origins["http.socket"] = machine.default_socket(node.state_dir, state_dir_given)
        http = replace(http, socket=socket)
    if "http.certificate" not in origins and "http.key" not in origins:
        origins["http.certificate"] = origins["http.key"] = OWN_CERTIFICATE
        folder = node.state_dir / "edge"
        http = replace(http, certificate=folder / "certificate.pem", key=folder / "key.pem")
    if "discovery.announce_models" not in origins:
        at_home = config.gossip.preset in (Preset.LAN, Preset.LOCAL)
        discovery = replace(discovery, announce_models=at_home)
        origins["discovery.announce_models"] = f"gossip.preset {config.gossip.preset}"
    return replace(config, node=node, discovery=discovery, http=http, origins=origins)


def _check_relations(config: Config) -> None:
    """What one field alone cannot tell."""
    for key, address in (
        ("listen.host", config.listen.host),
        ("listen.advertise", config.listen.advertise),
    ):
        if address and not _is_address(address):
            raise _relation(
                config, key, f'"{address}": expected an IP address, such as 0.0.0.0 or 192.168.1.10'
            )
    _check_http(config)
    _check_gossip(config)
    _check_access(config)
    for seed in config.discovery.seeds:
        if int(seed.rpartition(":")[2]) not in range(1, 65_536):
            raise _relation(config, "discovery.seeds", f'"{seed}": expected a port from 1 to 65535')
    if config.http.request_bytes_max > config.limits.request_bytes_max:
        raise _relation(
            config,
            "http.request_bytes_max",
            f"{config.http.request_bytes_max} is above limits.request_bytes_max"
            f" ({config.limits.request_bytes_max}): what comes in could not be forwarded",
        )
    if config.limits.deadline_s > config.limits.deadline_max_s:
        raise _relation(
            config,
            "limits.deadline_s",
            f"{config.limits.deadline_s:g} is above limits.deadline_max_s ({config.limits.deadline_max_s:g})",
        )


def _check_http(config: Config) -> None:
    http = config.http
    if http.host != "localhost" and not _is_address(http.host):
        raise _relation(
            config,
            "http.host",
            f'"{http.host}": expected an IP address, such as 127.0.0.1 or 0.0.0.0',
        )
    for key, other in (("certificate", "key"), ("key", "certificate")):
        if f"http.{key}" in config.origins and f"http.{other}" not in config.origins:
            raise _relation(
                config, f"http.{key}", f"goes together with http.{other}: give both, or neither"
            )
    if len(bytes(http.socket)) > SOCKET_PATH_BYTES_MAX:
        raise _relation(
            config,
            "http.socket",
            f"{http.socket} is longer than {SOCKET_PATH_BYTES_MAX} bytes, the longest the system takes:"
            " set a shorter http.socket",
        )


def _check_gossip(config: Config) -> None:
    try:
        gossip.gossip_config(config.gossip)
    except gossip.UnknownTimer as error:
        name = str(error)
        near = _nearest(name, gossip.NAMES)
        hint = f'did you mean "{near}"?' if near else "`meshd config show` lists those that exist"
        key = f"gossip.overrides.{name}"
        raise UnknownKey(
            f'unknown key "{_shortened(name)}" in [gossip.overrides]; {hint}',
            origin=config.origins[key],
            key=key,
            suggestion=near,
        ) from error
    except Unsuitable as error:
        name = str(error).partition(" ")[0]
        key = f"gossip.overrides.{name}"
        raise BadValue(f"gossip.overrides.{error}", origin=config.origins[key], key=key) from error


def _check_access(config: Config) -> None:
    """The rules, each by its line: a file of many has many of the same keys."""
    try:
        access_rules(config.access.rules)
    except BadRule as error:
        origin = config.origins.get("access.rules", "default")
        with suppress(OSError):  # it is a file, unless the rules came by a variable
            text = Path(origin).read_text("utf-8", "replace")
            line = rule_line(text, error.number, error.key)
            origin = origin if line is None else f"{origin}, line {line}"
        key = f"access.rules.{error.number}.{error.key}".rstrip(".")
        raise BadValue(f"rule {error.number}: {error}", origin=origin, key=key) from error


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _relation(config: Config, key: str, message: str) -> ConfigError:
    return BadValue(f"{key} = {message}", origin=config.origins.get(key, "default"), key=key)


def _unknown_section(section: str, origin: str) -> UnknownKey:
    near = _nearest(section, list(SECTIONS))
    owners = [
        name
        for name, kind in SECTIONS.items()
        if section in {field.name for field in dataclasses.fields(kind)}
    ]
    if owners:
        hint = "it belongs below " + " or ".join(f"[{name}]" for name in owners)
        near = f"{owners[0]}.{section}"
    elif near:
        hint = f'did you mean "{near}"?'
    else:
        hint = f"there are {', '.join(SECTIONS)}"
    return UnknownKey(
        f'unknown section "{_shortened(section)}"; {hint}',
        origin=origin,
        key=section,
        suggestion=near,
    )


def _unknown_key(item: _Given, valid: Sequence[str]) -> UnknownKey:
    near = _nearest(item.key, valid)
    hint = f'did you mean "{near}"?' if near else f"there are {', '.join(valid)}"
    return UnknownKey(
        f'unknown key "{_shortened(item.key)}" in [{item.section}]; {hint}',
        origin=item.origin,
        key=f"{item.section}.{item.key}",
        suggestion=near,
    )


def _bad_value(item: _Given, expected: str) -> BadValue:
    key = f"{item.section}.{item.key}"
    shown = REDACTED if is_secret_name(item.key) else _shortened(repr(item.raw))
    return BadValue(f"{key} = {shown}: {expected}", origin=item.origin, key=key)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS_MAX else text[: _SHOWN_CHARS_MAX - 3] + "..."


def _nearest(word: str, valid: Sequence[str]) -> str:
    folded = word.lower().replace("-", "_")
    close = difflib.get_close_matches(folded, valid, 1, 0.6)
    if close:
        return close[0]
    starts = [
        name
        for name in valid
        if len(folded) >= 3 and (name.startswith(folded) or folded.startswith(name))
    ]
    return starts[0] if starts else ""
