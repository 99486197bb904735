"""HTTP to the daemon, by its Unix socket or from another machine, with the standard library: starting fast matters."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import quote

from meshd.cli.failures import (
    CommandError,
    Exit,
    ServerError,
    no_answer,
    not_permitted,
    not_running,
)

if TYPE_CHECKING:
    from meshd.cli.remote import Remote
    from meshd_plugins.api import Value

ANSWER_S: Final = 5.0  # for views
LEAVE_S: Final = 15.0  # leaving waits until it was told to peers
LINE_S: Final = 30.0  # between lines of an ask; the daemon says `waiting` every 10 s
_LINE_BYTES_MAX: Final = 16 << 20


class _UnixConnection(http.client.HTTPConnection):
    """`HTTPConnection` to a path."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect; the caller maps what is raised."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


class Client:
    """A daemon's mesh API; `path` is the socket that is used.

    Args:
        paths: where its socket may be, best first; the first that exists is used.
        remote: a daemon on another machine, which is used instead.
    """

    def __init__(self, paths: tuple[Path, ...], remote: Remote | None = None) -> None:
        existing = (path for path in paths if _exists(path))
        self.path = next(existing, paths[0]) if paths else Path()
        self.remote = remote

    @property
    def where(self) -> str:
        """Socket or URL, for people."""
        return str(self.path) if self.remote is None else self.remote.url

    @property
    def has_socket(self) -> bool:
        """Whether there is something where the socket should be."""
        return self.remote is None and _exists(self.path)

    def get(self, view: str, *, timeout_s: float = ANSWER_S, **query: str) -> Mapping[str, Value]:
        """One of the views, such as `status`; docs/api.md lists them.

        Raises:
            CommandError: not reachable, or the daemon's own error.
        """
        target = f"/mesh/v1/{view}"
        if query:
            target += "?" + "&".join(
                f"{key}={quote(value, safe='')}" for key, value in query.items()
            )
        with self._exchange("GET", target, None, timeout_s) as response:
            return _object(response.read())

    def post(
        self, action: str, payload: Mapping[str, Value], *, timeout_s: float = ANSWER_S
    ) -> Mapping[str, Value]:
        """Do something, such as `keys`; docs/api.md lists what there is.

        Raises:
            CommandError: not reachable, or the daemon's own error.
        """
        with self._exchange("POST", f"/mesh/v1/{action}", payload, timeout_s) as response:
            return _object(response.read())

    def infer(
        self, endpoint: str, payload: Mapping[str, Value], *, timeout_s: float
    ) -> Mapping[str, Value]:
        """The answer of one of OpenAI's endpoints, such as `embeddings`, as a whole.

        Raises:
            CommandError: not reachable, or the daemon's own error.
        """
        with self._exchange("POST", f"/v1/{endpoint}", payload, timeout_s) as response:
            return _object(response.read())

    def delete(self, thing: str, name: str, *, timeout_s: float = ANSWER_S) -> Mapping[str, Value]:
        """Take something away, such as one of the `keys`.

        Raises:
            CommandError: not reachable, or the daemon's own error.
        """
        target = f"/mesh/v1/{thing}/{quote(name, safe='')}"
        with self._exchange("DELETE", target, None, timeout_s) as response:
            return _object(response.read())

    def leave(self) -> None:
        """Tell the daemon to leave its mesh and stop."""
        with self._exchange("POST", "/mesh/v1/leave", {}, LEAVE_S) as response:
            response.read()

    def ask(self, payload: Mapping[str, Value]) -> Generator[Mapping[str, Value], None, None]:
        """The events of an ask. Abandoning the iterator cancels the ask.

        Raises:
            CommandError: not reachable, or the daemon's own error, or the stream ended too early.
        """
        begun = False
        with self._exchange("POST", "/mesh/v1/ask", payload, LINE_S) as response:
            while line := self._line(response, begun=begun):
                event = _object(line)
                match event.get("event"):
                    case "waiting":
                        continue
                    case "error":
                        status = event.get("status")
                        status = status if isinstance(status, int) else 500
                        raise ServerError(status, event, begun=begun)
                    case "answered":
                        yield event
                        return
                    case "piece":
                        begun = True
                        yield event
                    case _:
                        yield event
        raise _torn()

    def operate(
        self, plugin: str, verb: str, arguments: Mapping[str, Value]
    ) -> Generator[Mapping[str, Value], None, None]:
        """Have a plugin do something: events `progress`, and at last `done`. Abandoning it ends it there.

        Raises:
            CommandError: not reachable, or the daemon's own error, or the stream ended too early.
        """
        target = f"/mesh/v1/plugins/{quote(plugin, safe='')}/{quote(verb, safe='')}"
        with self._exchange("POST", target, arguments, LINE_S) as response:
            while line := self._line(response, begun=False):
                event = _object(line)
                match event.get("event"):
                    case "waiting":
                        continue
                    case "error":
                        status = event.get("status")
                        raise ServerError(status if isinstance(status, int) else 500, event)
                    case _:
                        yield event
                        if event.get("event") == "done":
                            return
        raise _torn()

    def _line(self, response: http.client.HTTPResponse, *, begun: bool) -> bytes:
        try:
            return response.readline(_LINE_BYTES_MAX)
        except (http.client.HTTPException, ConnectionError) as error:
            raise _torn() from error
        except TimeoutError as error:
            if begun:
                raise CommandError(
                    f"the answer stopped: nothing for {LINE_S:g} s", Exit.BROKEN
                ) from error
            raise

    @contextmanager
    def _exchange(
        self, method: str, target: str, payload: Mapping[str, Value] | None, timeout_s: float
    ) -> Generator[http.client.HTTPResponse, None, None]:
        remote = self.remote
        connection = (
            _UnixConnection(self.path, timeout_s)
            if remote is None
            else remote.connection(timeout_s)
        )
        try:
            body = None if payload is None else json.dumps(payload).encode()
            headers = {} if body is None else {"Content-Type": "application/json"}
            if remote is not None and remote.key:
                headers["Authorization"] = f"Bearer {remote.key}"
            # A daemon that refuses a request may close before it has all of it; its answer is there.
            with suppress(BrokenPipeError):
                connection.request(method, target, body=body, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(response)
            yield response
        except TimeoutError as error:
            raise no_answer(self.where, timeout_s) from error
        except (http.client.HTTPException, OSError) as error:
            raise self._failure(error) from error
        finally:
            connection.close()

    def _failure(self, error: http.client.HTTPException | OSError) -> CommandError:
        """What went wrong between us and the daemon."""
        broken = CommandError(f"the daemon broke off: {type(error).__name__}", Exit.UNREACHABLE)
        if isinstance(error, http.client.HTTPException):
            return broken
        if self.remote is not None:
            from meshd.cli.remote import unreachable

            return unreachable(self.remote.url, error)
        match error:
            case FileNotFoundError() | ConnectionRefusedError() | NotADirectoryError():
                return not_running(self.path)
            case PermissionError():
                return not_permitted(self.path)
            case ConnectionError():
                return broken
            case _:
                raise error


def _exists(path: Path) -> bool:
    """Whether something is there, as far as may be seen: a closed folder counts as something."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.EACCES
    return True


def _object(raw: bytes) -> Mapping[str, Value]:
    try:
        value: object = json.loads(raw)
    except ValueError as error:
        raise _torn() from error
    if not isinstance(value, dict):
        raise _torn()
    return cast("Mapping[str, Value]", value)


def _refusal(response: http.client.HTTPResponse) -> ServerError:
    body = _object(response.read(_LINE_BYTES_MAX))
    error = body.get("error")
    return ServerError(response.status, error if isinstance(error, Mapping) else {})


def _torn() -> CommandError:
    return CommandError("the answer ended before it was complete", Exit.BROKEN)
