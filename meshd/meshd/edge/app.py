"""The one application of the edge: OpenAI's API and the mesh API, the same on every socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from meshd.edge.access_api import AdminRecorder, access_routes
from meshd.edge.context import context_of
from meshd.edge.counters import EdgeCounters
from meshd.edge.embeddings import Vectors
from meshd.edge.embeddings_request import parse_embeddings, parse_rerank
from meshd.edge.errors import RequestError
from meshd.edge.front import Front
from meshd.edge.gate import Gate
from meshd.edge.http import send_json
from meshd.edge.invite_api import invite_routes
from meshd.edge.keys_api import KeyList, KeyMaker, KeyRevoker
from meshd.edge.limits import EdgeLimits
from meshd.edge.look_api import Doctor, Metrics, StoreDiff, StoreView
from meshd.edge.mesh_api import Leave, MeshAsk, Resolve, Status, View
from meshd.edge.openai import CHAT, COMPLETION, Completions, ModelList
from meshd.edge.plugin_api import plugin_routes
from meshd.edge.targets import Models
from meshd.edge.trust_api import trust_routes

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from meshd.core.bodies import Bodies
    from meshd.edge.exposure import Exposure
    from meshd.edge.plugin_api import Operate
    from meshd.orchestrate.service import AccessService, MeshService
    from meshd.orchestrate.trust_desk import TrustDesk
    from meshd.shell.joining_desk import JoinDesk


def build_app(
    service: MeshService,
    limits: EdgeLimits | None = None,
    *,
    exposure: Exposure | None = None,
    counters: EdgeCounters | None = None,
    access: AccessService | None = None,
    desk: JoinDesk | None = None,
    trust: TrustDesk | None = None,
    operate: Operate | None = None,
    bodies: Bodies | None = None,
) -> Starlette:
    """The application over `service`. It holds no state of its own but a second of catalogue, and rates.

    Args:
        service: what it is a face of.
        limits: what one client may cost.
        exposure: API keys and certificate; without it no key is good.
        counters: the server's, which are then shown beside the application's.
        access: rules and the audit trail, where there are any to show.
        desk: where others are let in, where they can be.
        trust: who belongs to the mesh, and under which keys.
        operate: what plugins can be had to do.
        bodies: bounds what the bodies of requests take together.
    """
    limits = limits or EdgeLimits()
    counters = counters or EdgeCounters()
    keys = None if exposure is None else exposure.keys
    models = Models(service)
    routes = [
        Route("/v1/chat/completions", Completions(service, models, limits, CHAT), methods=["POST"]),
        Route(
            "/v1/completions", Completions(service, models, limits, COMPLETION), methods=["POST"]
        ),
        Route(
            "/v1/embeddings", Vectors(service, models, limits, parse_embeddings), methods=["POST"]
        ),
        Route("/v1/rerank", Vectors(service, models, limits, parse_rerank), methods=["POST"]),
        Route("/v1/models", ModelList(models), methods=["GET"]),
        Route("/v1/models/{id:path}", ModelList(models), methods=["GET"]),
        Route("/mesh/v1/ask", MeshAsk(service, models, limits), methods=["POST"]),
        Route("/mesh/v1/resolve", Resolve(service, models), methods=["GET"]),
        Route("/mesh/v1/status", Status(service, exposure), methods=["GET"]),
        Route("/mesh/v1/peers", View("peers", service.peers), methods=["GET"]),
        Route("/mesh/v1/capabilities", View("capabilities", service.capabilities), methods=["GET"]),
        Route("/mesh/v1/plugins", View("plugins", service.plugins), methods=["GET"]),
        Route("/mesh/v1/config", View("config", service.config), methods=["GET"]),
        Route("/mesh/v1/store", StoreView(service), methods=["GET"]),
        Route("/mesh/v1/store/diff", StoreDiff(service, limits), methods=["GET"]),
        Route("/mesh/v1/doctor", Doctor(service, limits), methods=["GET"]),
        Route("/metrics", Metrics(service, counters), methods=["GET"]),
        Route("/mesh/v1/leave", Leave(service, limits), methods=["POST"]),
        Route("/mesh/v1/keys", KeyList(exposure), methods=["GET"]),
        Route("/mesh/v1/keys", KeyMaker(exposure, limits), methods=["POST"]),
        Route("/mesh/v1/keys/{name}", KeyRevoker(exposure), methods=["DELETE"]),
        Route("/healthz", Health(), methods=["GET"]),
        *(access_routes(access) if access else ()),
        *(invite_routes(desk, limits) if desk else ()),
        *(trust_routes(trust, limits) if trust else ()),
        *(plugin_routes(operate, limits) if operate else ()),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(
                Front,
                gate=Gate(keys, require_key=limits.require_key),
                names=() if exposure is None else exposure.names,
                counters=counters,
                bodies=bodies,
            ),
            *([Middleware(AdminRecorder, record=access.record)] if access else ()),
        ],
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
