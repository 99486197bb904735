"""The endpoints behind `meshd trust`, `appoint`, `revoke` and `keys`. They take the scope admin.

GET  /mesh/v1/trust           what holds: our certificate, the keys, the clocks, who is out
POST /mesh/v1/trust/revoke    {"node", "reason", "keep_key", "force", "dry_run"}
POST /mesh/v1/trust/appoint   {"node"}
POST /mesh/v1/trust/rotate    {}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.routing import Route

from meshd.edge.context import context_of
from meshd.edge.errors import RequestError
from meshd.edge.http import from_json, read_body, send_json, to_json
from meshd.orchestrate.trust_desk import Revoking, TrustDesk
from meshd_plugins.api import Value

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from meshd.edge.limits import EdgeLimits


class TrustView:
    """`GET /mesh/v1/trust`. An ASGI application."""

    def __init__(self, desk: TrustDesk) -> None:
        self._desk = desk

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        await send_json(send, 200, to_json(self._desk.view()), context_of(scope).headers)


class TrustRevoke:
    """`POST /mesh/v1/trust/revoke`. An ASGI application."""

    def __init__(self, desk: TrustDesk, limits: EdgeLimits) -> None:
        self._desk = desk
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, once the decree is in force here."""
        limits = self._limits
        raw = await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        told = await self._desk.revoke(_asked(from_json(raw)))
        await send_json(send, 200, to_json(told), context_of(scope).headers)


class TrustAppoint:
    """`POST /mesh/v1/trust/appoint`. An ASGI application."""

    def __init__(self, desk: TrustDesk, limits: EdgeLimits) -> None:
        self._desk = desk
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, once the node has taken its new role."""
        limits = self._limits
        raw = await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        told = await self._desk.appoint(_node(from_json(raw)))
        await send_json(send, 200, to_json(told), context_of(scope).headers)


class TrustRotate:
    """`POST /mesh/v1/trust/rotate`. An ASGI application."""

    def __init__(self, desk: TrustDesk, limits: EdgeLimits) -> None:
        self._desk = desk
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, once the decree is in force here."""
        limits = self._limits
        await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        told = await self._desk.rotate()
        await send_json(send, 200, to_json(told), context_of(scope).headers)


def trust_routes(desk: TrustDesk, limits: EdgeLimits) -> tuple[Route, ...]:
    """All of them."""
    return (
        Route("/mesh/v1/trust", TrustView(desk), methods=["GET"]),
        Route("/mesh/v1/trust/revoke", TrustRevoke(desk, limits), methods=["POST"]),
        Route("/mesh/v1/trust/appoint", TrustAppoint(desk, limits), methods=["POST"]),
        Route("/mesh/v1/trust/rotate", TrustRotate(desk, limits), methods=["POST"]),
    )


def _node(payload: Mapping[str, Value]) -> str:
    node = payload.get("node")
    if not isinstance(node, str) or not node:
        raise RequestError("`node` must be a name or an id", param="node")
    return node


def _asked(payload: Mapping[str, Value]) -> Revoking:
    node, reason = _node(payload), payload.get("reason", "")
    if not isinstance(reason, str):
        raise RequestError("`reason` must be text", param="reason")
    flags = {name: payload.get(name, False) for name in ("keep_key", "force", "dry_run")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise RequestError(f"`{name}` must be true or false", param=name)
    return Revoking(
        node,
        reason,
        keep_key=flags["keep_key"] is True,
        force=flags["force"] is True,
        dry_run=flags["dry_run"] is True,
    )
