"""What stands before every endpoint: who calls, from where, and how errors are answered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast

import trio

from meshd.core.bodies import Bodies
from meshd.edge.context import CONTEXT_KEY, RequestContext, log_unexpected, make_context
from meshd.edge.errors import ClientGone, problem_of
from meshd.edge.gate import scope_of
from meshd.edge.http import SHARE_KEY, send_problem
from meshd.edge.sources import Sources
from meshd_plugins.api import HOP_HEADER, Refused

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from meshd.edge.counters import EdgeCounters
    from meshd.edge.gate import Access, Gate

_CHALLENGE: Final = ((b"www-authenticate", b'Bearer realm="meshd"'),)
_NOWHERE: Final = ("", 0)


class Front:
    """Identifies requests, checks who makes them and what page may have caused them, answers errors.

    What an endpoint raises before its answer began becomes an error answer here, and only here. Requests on the
    Unix socket are not checked: its file mode was, and no page reaches it.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        names: Iterable[str],
        counters: EdgeCounters,
        bodies: Bodies | None = None,
    ) -> None:
        self._bodies = bodies or Bodies()
        self._app = app
        self._gate = gate
        self._sources = Sources(names)
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; the server makes nothing but HTTP of what comes in."""
        assert scope["type"] == "http", scope["type"]
        context = make_context(scope)
        scope[CONTEXT_KEY] = context
        scope[SHARE_KEY] = share = self._bodies.share()
        self._counters.requests += 1
        try:
            if not context.unix:
                scope[CONTEXT_KEY] = context = replace(context, access=self._admit(scope))
            await self._app(scope, receive, send)
        except ClientGone:
            return
        except Exception as error:  # noqa: BLE001 - the per-request boundary: the daemon stays up
            await self._answer_error(scope, receive, send, context, error)
        finally:
            share.release()

    def _admit(self, scope: Scope) -> Access:
        """Who makes a request that came over TCP; raises RequestError for those who may not."""
        headers = dict(cast("Iterable[tuple[bytes, bytes]]", scope["headers"]))
        client = (scope["client"] or _NOWHERE)[0]
        server = (scope["server"] or _NOWHERE)[0]
        if HOP_HEADER.encode() in headers:
            raise Refused(
                "the request has left a mesh already: it would go in circles", code="hop_limit"
            )
        self._sources.check(headers, server)
        wanted = scope_of(scope["method"], scope["path"])
        return self._gate.enter(headers, client, server, wanted, trio.current_time())

    async def _answer_error(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        context: RequestContext,
        error: Exception,
    ) -> None:
        log_unexpected(context, scope, error)
        problem = problem_of(error)
        self._counters.refuse(problem.code)
        headers = context.headers + (_CHALLENGE if problem.status == 401 else ())
        await send_problem(scope, receive, send, problem, headers)
