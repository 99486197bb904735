"""What an administrator has a plugin do: `POST /mesh/v1/plugins/{plugin}/{verb}`. It takes the scope admin.

The answer is a line of JSON for each item, `{"event": "progress", ...}`, and at last `{"event": "done", ...}`
or `{"event": "error", ...}`. A client that goes ends what it asked for. An operation of which its plugin says that
it only reads is no act, and leaves no line in the audit trail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

from starlette.routing import Route

from meshd.edge.asking import EventStream
from meshd.edge.context import READING_KEY, context_of, log_unexpected
from meshd.edge.errors import ClientGone, RequestError, problem_of
from meshd.edge.events_json import problem_to_plain
from meshd.edge.http import from_json, read_body, to_json
from meshd_plugins.api import Refused, Value

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from meshd.edge.limits import EdgeLimits
    from meshd_plugins.operations import Item, Take

OPERATIONS_MAX: Final = 32
"""At once, of all plugins; each holds a connection."""

_BEAT: Final = b'{"event":"waiting"}\n'


class Operate(Protocol):
    """What plugins can be had to do, by plugin and verb."""

    def only_reads(self, name: str, verb: str) -> bool:
        """Whether it changes nothing, as its plugin says; False for what there is not."""
        ...

    async def operate(
        self, name: str, verb: str, arguments: Mapping[str, Value], take: Take
    ) -> None:
        """Run one, its items going to `take`. Raises LookupError, CapabilityError."""
        ...


class PluginOperations:
    """The endpoint. An ASGI application."""

    def __init__(self, plugins: Operate, limits: EdgeLimits) -> None:
        self._plugins = plugins
        self._limits = limits
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. The last line is `done` or `error`; anything else is a torso."""
        limits = self._limits
        context = context_of(scope)
        raw = await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        arguments = from_json(raw) if raw else {}
        plugin, verb = (str(scope["path_params"][key]) for key in ("plugin", "verb"))
        if self._plugins.only_reads(plugin, verb):
            scope[READING_KEY] = True
        stream = EventStream(receive, send, b"application/x-ndjson", _BEAT, limits.heartbeat_s)
        stream.headers.extend(context.headers)

        async def take(item: Item) -> None:
            done = item.get("done")
            if isinstance(done, Mapping):
                await stream.write(to_json({"event": "done", **done}) + b"\n")
            else:
                await stream.write(to_json({"event": "progress", **item}) + b"\n")

        async def relay() -> None:
            await self._plugins.operate(plugin, verb, arguments, take)

        if self._running >= OPERATIONS_MAX:
            raise Refused(f"{OPERATIONS_MAX} operations of plugins run already", code="busy")
        self._running += 1
        try:
            await stream.run(relay)
        except ClientGone:
            raise
        except Exception as error:
            failure = _unknown(error) if isinstance(error, LookupError) else error
            if not stream.started:
                raise failure from error
            log_unexpected(context, scope, failure)
            await stream.fail(to_json(problem_to_plain(problem_of(failure))) + b"\n")
        finally:
            self._running -= 1


def plugin_routes(plugins: Operate, limits: EdgeLimits) -> tuple[Route, ...]:
    """The one route."""
    endpoint = PluginOperations(plugins, limits)
    return (Route("/mesh/v1/plugins/{plugin}/{verb}", endpoint, methods=["POST"]),)


def _unknown(error: LookupError) -> RequestError:
    return RequestError(str(error.args[0]), code="unknown_operation", status=404)
