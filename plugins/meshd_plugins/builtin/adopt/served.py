"""A model in service, and the requests that its server has now."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from meshd_plugins.api import Refused
from meshd_plugins.builtin.adopt.client import Client
from meshd_plugins.builtin.adopt.config import Kind, ServerConfig
from meshd_plugins.builtin.adopt.rates import Meter
from meshd_plugins.builtin.adopt.tools import Tools

REQUESTS_MAX: Final = 256  # of one server at once; each is a connection


@dataclass(slots=True)
class Traffic:
    """The requests of one server."""

    busy: int = 0
    begun: int = 0

    @contextmanager
    def one(self) -> Generator[None]:
        """Count a request. Raises Refused(busy) when there are too many."""
        if self.busy >= REQUESTS_MAX:
            raise Refused(f"{REQUESTS_MAX} requests are at this server already", code="busy")
        self.busy += 1
        self.begun += 1
        try:
            yield
        finally:
            self.busy -= 1


@dataclass(slots=True)
class Served:
    """A model in service: what its capabilities share."""

    client: Client
    kind: Kind
    config: ServerConfig
    model: str  # as its server calls it
    traffic: Traffic
    troubled: Callable[[], None]  # told when the server should be looked at at once
    gone: Callable[[str], None]  # told of a model that its server does not have any more
    meter: Meter = field(default_factory=Meter)
    is_warm: bool | None = None
    tools: Tools = Tools.UNKNOWN
    was_measured: bool = False  # by a request of our own, or it was tried
