"""The one application of the edge: OpenAI's API and the mesh API, the same on every socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from meshd.edge.context import CONTEXT_KEY, context_of, log_unexpected, make_context
from meshd.edge.errors import ClientGone, RequestError, problem_of
from meshd.edge.http import header, send_json, send_problem
from meshd.edge.limits import EdgeLimits
from meshd.edge.look_api import Doctor, Metrics, StoreDiff, StoreView
from meshd.edge.mesh_api import Leave, MeshAsk, Resolve, View
from meshd.edge.openai import CHAT, COMPLETION, Completions, ModelList
from meshd.edge.targets import Models

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from meshd.orchestrate.service import MeshService

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def build_app(service: MeshService, limits: EdgeLimits | None = None) -> Starlette:
    """The application over `service`. It holds no state of its own but a second of catalogue."""
    limits = limits or EdgeLimits()
    models = Models(service)
    routes = [
        Route("/v1/chat/completions", Completions(service, models, limits, CHAT), methods=["POST"]),
        Route(
            "/v1/completions", Completions(service, models, limits, COMPLETION), methods=["POST"]
        ),
        Route("/v1/models", ModelList(models), methods=["GET"]),
        Route("/v1/models/{id:path}", ModelList(models), methods=["GET"]),
        Route("/mesh/v1/ask", MeshAsk(service, models, limits), methods=["POST"]),
        Route("/mesh/v1/resolve", Resolve(service, models), methods=["GET"]),
        Route("/mesh/v1/status", View("status", service.status), methods=["GET"]),
        Route("/mesh/v1/peers", View("peers", service.peers), methods=["GET"]),
        Route("/mesh/v1/capabilities", View("capabilities", service.capabilities), methods=["GET"]),
        Route("/mesh/v1/plugins", View("plugins", service.plugins), methods=["GET"]),
        Route("/mesh/v1/config", View("config", service.config), methods=["GET"]),
        Route("/mesh/v1/store", StoreView(service), methods=["GET"]),
        Route("/mesh/v1/store/diff", StoreDiff(service, limits), methods=["GET"]),
        Route("/mesh/v1/doctor", Doctor(service, limits), methods=["GET"]),
        Route("/metrics", Metrics(service), methods=["GET"]),
        Route("/mesh/v1/leave", Leave(service, limits), methods=["POST"]),
        Route("/healthz", Health(), methods=["GET"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Front, hosts=limits.hosts)],
        exception_handlers={404: _no_route, 405: _wrong_method},
    )


async def _no_route(request: Request, error: Exception) -> Response:
    raise RequestError(
        f"There is nothing at {request.url.path}; docs/api.md lists what there is",
        code="unknown_url",
        status=404,
    ) from error


async def _wrong_method(request: Request, error: Exception) -> Response:
    raise RequestError(
        f"{request.url.path} does not take {request.method}", code="method_not_allowed", status=405
    ) from error


class Health:
    """`GET /healthz`: the edge answers. An ASGI application."""

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        await send_json(send, 200, b'{"status":"ok"}', context_of(scope).headers)


class Front:
    """Stands before every endpoint: identifies requests, checks where they come from, answers errors.

    What an endpoint raises before its answer began becomes an error answer here, and only here.

    A web page that a person happens to look at can send requests to loopback. Two checks keep it out:
    the Host header must be a loopback name (a page that rebinds its own DNS name to 127.0.0.1 sends its
    own name), and an Origin header, which browsers add to cross-site posts, must be loopback too. There
    are no CORS headers, so pages of other origins can read nothing. A Unix socket has its file mode.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] = ()) -> None:
        self._app = app
        self._hosts = _LOOPBACK | {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; anything but HTTP is turned away."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        context = make_context(scope)
        scope[CONTEXT_KEY] = context
        try:
            if not context.unix:
                self._check_source(scope)
            await self._app(scope, receive, send)
        except ClientGone:
            return
        except Exception as error:  # noqa: BLE001 - the per-request boundary: the daemon stays up
            log_unexpected(context, scope, error)
            await send_problem(scope, receive, send, problem_of(error), context.headers)

    def _check_source(self, scope: Scope) -> None:
        host = header(scope, b"host")
        if _host_name(host) not in self._hosts:
            raise RequestError(
                f"Host {host!r} is not a name of this machine's loopback; use localhost or 127.0.0.1",
                code="host_not_allowed",
                status=403,
            )
        origin = header(scope, b"origin")
        if origin and _host_name(origin.partition("://")[2]) not in self._hosts:
            raise RequestError(
                f"Requests from web pages of {origin!r} are not served",
                code="origin_not_allowed",
                status=403,
            )


def _host_name(host: str) -> str:
    """The name in a Host header: without its port, without brackets, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
