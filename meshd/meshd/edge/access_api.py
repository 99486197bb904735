"""Endpoints for who may use what, and for what left this node."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import parse_qs

from starlette.routing import Route

from meshd.edge.context import READING_KEY, context_of
from meshd.edge.errors import RequestError
from meshd.edge.gate import scope_of
from meshd.edge.http import send_json, to_json
from meshd.edge.mesh_api import View
from meshd.orchestrate.audit import READ_MAX, Recorder, Wanted
from meshd.trust.api_keys import Scope as KeyScope

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from meshd.orchestrate.service import AccessService

_CLASSES: Final = ("local", "lan", "mesh", "cloud")
_COUNT_DIGITS_MAX: Final = 18
_ACT_CHARS_MAX: Final = 200
_READING: Final = frozenset({"GET", "HEAD"})
_OK: Final = 200


def access_routes(access: AccessService) -> list[Route]:
    """The routes over one node's rules and trail. The trail is for whoever may administer the node."""
    return [
        Route("/mesh/v1/access", View("access", access.access), methods=["GET"]),
        Route("/mesh/v1/access/check", AccessCheck(access), methods=["GET"]),
        Route("/mesh/v1/audit", AuditRead(access), methods=["GET"]),
        Route("/mesh/v1/audit/verify", AuditVerify(access), methods=["GET"]),
    ]


class AdminRecorder:
    """Stands before every endpoint: notes in the trail who changed something at this node, and how it ended.

    What was sent along is not noted: it may hold a secret.
    """

    def __init__(self, app: ASGIApp, record: Recorder) -> None:
        self._app = app
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        method, path = scope["method"], scope["path"]
        if method in _READING or scope_of(method, path) is not KeyScope.ADMIN:
            await self._app(scope, receive, send)
            return
        statuses: list[int] = []

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            if scope.get(READING_KEY) is not True:
                self._record(
                    "admin",
                    act=f"{method} {path}"[:_ACT_CHARS_MAX],
                    caller=context_of(scope).access.principal,
                    outcome="ok" if statuses == [_OK] else "refused",
                )


class AccessCheck:
    """`GET /mesh/v1/access/check?name=NAME&caller=CALLER&privacy=CLASS&at=NODE`. An ASGI application."""

    def __init__(self, access: AccessService) -> None:
        self._access = access

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request; another node is asked when `at` names one."""
        query = _query(scope, ("name", "caller", "privacy", "at"))
        if not query["name"]:
            raise RequestError("Exactly one `name` is wanted in the query", param="name")
        _one_of(query, "privacy", _CLASSES)
        found = await self._access.check(
            query["name"], query["caller"], query["privacy"], query["at"]
        )
        await send_json(send, 200, to_json(found), context_of(scope).headers)


class AuditRead:
    """`GET /mesh/v1/audit?since=&to=&class=&kind=&after=&limit=`. An ASGI application."""

    def __init__(self, access: AccessService) -> None:
        self._access = access

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request with the newest lines that fit, oldest first."""
        query = _query(scope, ("since", "to", "class", "kind", "after", "limit"))
        _one_of(query, "class", _CLASSES)
        wanted = Wanted(
            since_s=_number(query, "since"),
            to=query["to"],
            privacy=query["class"],
            kind=query["kind"],
            after=_count(query, "after", 0),
            limit=max(1, min(READ_MAX, _count(query, "limit", READ_MAX))),
        )
        found = await self._access.audit(wanted)
        await send_json(send, 200, to_json(found), context_of(scope).headers)


class AuditVerify:
    """`GET /mesh/v1/audit/verify`. An ASGI application."""

    def __init__(self, access: AccessService) -> None:
        self._access = access

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request, once the whole trail was read."""
        found = await self._access.audit_verify()
        await send_json(send, 200, to_json(found), context_of(scope).headers)


def _query(scope: Scope, known: tuple[str, ...]) -> dict[str, str]:
    """Each parameter's one value, "" where it is absent; a misspelt one must not pass for none."""
    given = parse_qs(cast("bytes", scope["query_string"]).decode("latin-1"), keep_blank_values=True)
    for name, values in given.items():
        if name not in known:
            raise RequestError(
                f"`{name[:64]}` is unknown; there are {', '.join(known)}",
                param=name[:64],
                code="unsupported_parameter",
            )
        if len(values) != 1:
            raise RequestError(f"At most one `{name}` is wanted in the query", param=name)
    return {name: given.get(name, [""])[0] for name in known}


def _one_of(query: Mapping[str, str], name: str, known: tuple[str, ...]) -> None:
    if query[name] and query[name] not in known:
        raise RequestError(f"`{name}` must be one of {', '.join(known)}", param=name)


def _number(query: Mapping[str, str], name: str) -> float:
    try:
        value = float(query[name] or 0.0)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"`{name}` must be a time in seconds since 1970", param=name)
    return value


def _count(query: Mapping[str, str], name: str, default: int) -> int:
    text = query[name]
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= _COUNT_DIGITS_MAX):
        raise RequestError(f"`{name}` must be a whole number", param=name)
    return int(text)
