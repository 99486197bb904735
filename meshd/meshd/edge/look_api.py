"""The endpoints an operator's tools look at: the store, what is wrong, and metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import parse_qs

from meshd.edge.asking import until_gone
from meshd.edge.context import context_of
from meshd.edge.errors import RequestError
from meshd.edge.http import read_body, send_json, to_json

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from meshd.edge.counters import EdgeCounters
    from meshd.edge.limits import EdgeLimits
    from meshd.orchestrate.metrics import Family
    from meshd.orchestrate.service import MeshService
    from meshd_plugins.api import Value

METRICS_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"


class StoreView:
    """`GET /mesh/v1/store?node=NODE`. An ASGI application."""

    def __init__(self, service: MeshService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = to_json(self._service.store(_node(scope)))
        await send_json(send, 200, body, context_of(scope).headers)


class StoreDiff:
    """`GET /mesh/v1/store/diff?node=NODE`. An ASGI application."""

    def __init__(self, service: MeshService, limits: EdgeLimits) -> None:
        self._service = service
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the peer is asked, and no longer than the client waits."""
        node = _node(scope)
        if not node:
            raise RequestError("Exactly one `node` is wanted in the query", param="node")
        ask = partial(self._service.store_diff, node)
        await _answer_when_found(scope, receive, send, ask, self._limits)


class Doctor:
    """`GET /mesh/v1/doctor`. An ASGI application."""

    def __init__(self, service: MeshService, limits: EdgeLimits) -> None:
        self._service = service
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, after some seconds."""
        await _answer_when_found(scope, receive, send, self._service.doctor, self._limits)


class Metrics:
    """`GET /metrics` in Prometheus's text exposition format. An ASGI application."""

    def __init__(self, service: MeshService, counters: EdgeCounters) -> None:
        self._service = service
        self._counters = counters

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        families = (*self._service.metrics(), *self._counters.families())
        body = exposition(families).encode()
        headers = [
            (b"content-type", METRICS_TYPE),
            (b"content-length", b"%d" % len(body)),
            *context_of(scope).headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _answer_when_found(
    scope: Scope,
    receive: Receive,
    send: Send,
    find: Callable[[], Awaitable[Mapping[str, Value]]],
    limits: EdgeLimits,
) -> None:
    """Answer with what takes a while to find; a client that leaves ends the search."""
    await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
    found: list[Mapping[str, Value]] = []

    async def work() -> None:
        found.append(await find())

    await until_gone(receive, work)
    await send_json(send, 200, to_json(found[0]), context_of(scope).headers)


def exposition(families: Iterable[Family]) -> str:
    """The text format: HELP, TYPE, then a line for each combination of labels."""
    lines: list[str] = []
    for family in families:
        kind = "counter" if family.is_counter else "gauge"
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {kind}"]
        for labels, value in family.samples:
            inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            where = f"{{{inside}}}" if inside else ""
            lines.append(f"{family.name}{where} {_figure(value)}")
    return "\n".join([*lines, ""])


def _figure(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _node(scope: Scope) -> str:
    """The one `node` of the query, "" without one."""
    query = cast("bytes", scope["query_string"]).decode("latin-1")
    nodes = parse_qs(query, keep_blank_values=True).get("node", [""])
    if len(nodes) != 1:
        raise RequestError("At most one `node` is wanted in the query", param="node")
    return nodes[0]
