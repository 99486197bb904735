"""Where plugins come from: installed entry points, and modules that are named outright."""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from meshd_plugins.hookspecs import PROJECT

OFF_BY_DEFAULT: Final = frozenset({"echo"})
"""Plugins that only run when they are enabled by name: they are for tests and measurements."""


@dataclass(frozen=True, slots=True)
class Source:
    """A plugin that could be loaded; nothing is imported before `load` is called."""

    name: str
    version: str  # of the distribution it comes in, "" when unknown
    load: Callable[[], object]


class UnknownPluginError(Exception):
    """The configuration names a plugin that is not installed. Nothing was loaded."""


def entry_points() -> tuple[Source, ...]:
    """What is installed under the entry-point group, sorted by name."""
    found = {
        point.name: Source(point.name, point.dist.version if point.dist else "", point.load)
        for point in importlib.metadata.entry_points(group=PROJECT)
    }
    return tuple(found[name] for name in sorted(found))


def of_objects(plugins: Mapping[str, object]) -> tuple[Source, ...]:
    """Plugins that are there already, by name: for tests and for embedding."""
    return tuple(
        Source(name, _version_of(plugin), _returning(plugin)) for name, plugin in plugins.items()
    )


def _returning(plugin: object) -> Callable[[], object]:
    return lambda: plugin


def _version_of(plugin: object) -> str:
    version = getattr(plugin, "__version__", "") if isinstance(plugin, ModuleType) else ""
    return version if isinstance(version, str) else ""


def check_selection(
    known: Collection[str],
    enabled: Sequence[str],
    disabled: Sequence[str],
    configured: Iterable[str],
) -> None:
    """Reject names of plugins that are not installed, and a name that is both on and off.

    Raises:
        UnknownPluginError: with the place and the nearest known name.
    """
    for where, names in (
        ("plugins.enable", enabled),
        ("plugins.disable", disabled),
        ("a table [plugins.*]", configured),
    ):
        for name in names:
            if name not in known:
                raise UnknownPluginError(
                    f"{where} names the plugin {name!r}, which is not installed; "
                    f"{nearest(name, known)}"
                )
    both = sorted(set(enabled) & set(disabled))
    if both:
        raise UnknownPluginError(f"the plugin {both[0]!r} is both enabled and disabled")


def nearest(name: str, known: Collection[str]) -> str:
    """Say which known name was probably meant."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known)) or 'none'}"
