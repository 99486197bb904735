"""Every value in force with where it came from: what `meshd config show` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import cast

from meshd.config.fields import about_of
from meshd.config.gossip import NAMES as GOSSIP_NAMES
from meshd.config.gossip import gossip_config
from meshd.config.redaction import REDACTED, is_secret_name, without_url_user
from meshd.config.sections import SECTIONS, Config
from meshd_plugins.api import Value


def describe(config: Config) -> list[Mapping[str, Value]]:
    """Lines of `{"key", "value", "origin", "doc"}` in the order of the sections; secrets redacted.

    The values are plain: JSON and msgpack can carry them.
    """
    lines: list[Mapping[str, Value]] = []
    for section_name, section in SECTIONS.items():
        table = getattr(config, section_name)
        for field in dataclasses.fields(section):
            about = about_of(field.metadata)
            if field.name == "overrides":
                lines += _timers(config, about.doc)
                continue
            prefix = section_name if field.name == "tables" else f"{section_name}.{field.name}"
            for key, value in _flat(prefix, getattr(table, field.name)):
                hidden = (about.secret or is_secret_name(key.rpartition(".")[2])) and value not in (
                    "",
                    None,
                )
                lines.append(
                    {
                        "key": key,
                        "value": REDACTED if hidden else _shown(value),
                        "origin": _origin(config, key),
                        "doc": about.doc,
                    }
                )
    return lines


def _timers(config: Config, doc: str) -> list[Mapping[str, Value]]:
    """Every timer of the gossip core as it is in force, so that each has a name to override."""
    timers = gossip_config(config.gossip)
    preset = f"preset {config.gossip.preset}"
    return [
        {
            "key": f"gossip.overrides.{name}",
            "value": _shown(getattr(timers, name)),
            "origin": config.origins.get(f"gossip.overrides.{name}", preset),
            "doc": doc,
        }
        for name in GOSSIP_NAMES
    ]


def _origin(config: Config, key: str) -> str:
    """Of the key, or of the nearest table around it that somebody gave."""
    while key:
        if key in config.origins:
            return config.origins[key]
        key = key.rpartition(".")[0]
    return "default"


def _flat(key: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        table = cast("Mapping[str, object]", value)
        for name, inner in table.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, value


def _shown(value: object) -> Value:
    match value:
        case StrEnum():
            return value.value
        case Path():
            return str(value)
        case str():
            return without_url_user(value)
        case None | bool() | int() | float() | bytes():
            return value
        case Mapping():
            table = cast("Mapping[str, object]", value)
            return {
                name: REDACTED if is_secret_name(name) else _shown(inner)
                for name, inner in table.items()
            }
        case Sequence():
            items = cast("Sequence[object]", value)
            return [_shown(item) for item in items]
        case _:
            raise AssertionError(f"no way to show {type(value).__name__}")
