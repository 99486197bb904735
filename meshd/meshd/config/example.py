"""Writes the example configuration: every section, every key, its text and its default.

`python -m meshd.config.example > deploy/meshd.example.toml`; a test fails when the two differ.
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import cast

from meshd.config.fields import About, Tables, about_of, default_of, kind_of
from meshd.config.sections import SECTIONS
from meshd.config.values import kind_in_words

_WIDTH = 100

_HEAD = """\
meshd: example configuration, with every setting and its default.

Copy it to /etc/meshd/meshd.toml, or name a file with `meshd --config FILE` or MESHD_CONFIG, and take
the "#" away where a value should differ. Nothing has to be set. A key that does not exist is refused.
A single value can also come from the environment (MESHD_HTTP_PORT=0). `meshd config show` prints what
is in force and where it came from.
"""


def example() -> str:
    """The whole file; it ends with a newline."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    for line in _HEAD.splitlines():
        yield f"# {line}".rstrip()
    for name, section in SECTIONS.items():
        yield ""
        yield from _comment((section.__doc__ or "").strip().splitlines()[0])
        yield f"[{name}]"
        tables: list[str] = []
        for field in dataclasses.fields(section):
            about = about_of(field.metadata)
            default = default_of(field)
            if isinstance(default, Mapping | Tables):
                tables += ["", *_comment(about.doc)]
                continue
            yield ""
            yield from _comment(f"{about.doc} {_facts(about, kind_of(field))}")
            yield f"#{field.name} = {_toml(default)}"
        yield from tables
        if name == "plugins":
            yield from _PLUGIN_EXAMPLE
        elif name == "gossip":
            yield "#[gossip.overrides]"
        elif name == "access":
            yield from _RULE_EXAMPLE


_PLUGIN_EXAMPLE = (
    "#",
    "# Where `meshd model add hf:OWNER/REPO/FILE` looks, how much it may fetch (MiB, 0: what the disk has), and how",
    "# much memory all loaded models may take together (MiB, 0: what the machine has but for a tenth):",
    "#     [plugins.llama]",
    '#     hub_url = "https://mirror.example/hub"',
    "#     disk_mib_max = 0",
    "#     memory_mib_max = 0",
    "#",
    "# A model (0, -1: chosen for the machine; keep: from the start on, or when it is asked for):",
    "#     [[plugins.llama.models]]",
    '#     path = "/var/lib/meshd/models/small.gguf"',
    '#     names = ["knowledge.gpt/general"]',
    "#     context = 4096",
    "#     slots = 0",
    "#     threads = 0",
    "#     gpu_layers = -1",
    '#     keep = "demand"',
    "#     idle_unload_s = 600",
    '#     sha256 = "64 hexadecimal digits, as sha256sum prints: another file is refused"',
    '#     projector = "/var/lib/meshd/models/mmproj-small.gguf"   # has it read images or sound',
    "#",
    "# Memory for a part of a peer's model (MiB); and on that peer, in the table of its model, who holds parts of it:",
    "#     [plugins.llama.rpc]",
    "#     offer_mib = 4096",
    '#     split = ["board-b"]',
    "#",
    "# A server of models that runs already (on this machine, well-known ports are looked at anyway):",
    "#     [[plugins.adopt.servers]]",
    '#     url = "http://127.0.0.1:11434"',
    '#     names = { "llama3*" = ["knowledge.gpt/general"] }',
    "#",
    "# An object that others may fetch by name:",
    "#     [plugins.document]",
    '#     files = { "data.gpt/shelf/handbook" = "/var/lib/meshd/handbook.md" }',
)


_RULE_EXAMPLE = (
    "#",
    "# The diary is for one other node and for whoever holds one API key of this node:",
    "#     [[access.rules]]",
    '#     name = "data.gpt/diary/**"',
    '#     callers = ["local", "laptop", "key:phone"]',
    '#     privacy = ["local", "lan"]',
    '#     effect = "allow"',
    '#     comment = "family only"',
)


def _facts(about: About, kind: type) -> str:
    facts = kind_in_words(kind)
    if about.minimum is not None and about.maximum is not None and kind in (int, float):
        facts += f", {about.minimum:.12g} to {about.maximum:.12g}"
    if about.derived:
        facts += f"; default: {about.derived}"
    return f"({facts[0].upper()}{facts[1:]}.)"


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - 2, break_long_words=False, break_on_hyphens=False):
        yield f"# {line}"


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case StrEnum():
            return f'"{value.value}"'
        case int() | float():
            return repr(value)
        case str() | Path():
            assert '"' not in str(value)
            assert "\\" not in str(value)
            return f'"{value}"'
        case tuple():
            items = cast("tuple[object, ...]", value)
            return "[" + ", ".join(_toml(item) for item in items) + "]"
        case _:
            raise AssertionError(f"no TOML for {type(value).__name__}")


if __name__ == "__main__":
    sys.stdout.write(example())
