"""HTTP over the daemon's Unix socket, with the standard library: starting fast matters here."""

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
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        existing = (path for path in paths if _exists(path))
        self.path = next(existing, paths[0])

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
        connection = _UnixConnection(self.path, timeout_s)
        try:
            body = None if payload is None else json.dumps(payload).encode()
            headers = {} if body is None else {"Content-Type": "application/json"}
            # A daemon that refuses a request may close before it has all of it; its answer is there.
            with suppress(BrokenPipeError):
                connection.request(method, target, body=body, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(response)
            yield response
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise not_running(self.path) from error
        except PermissionError as error:
            raise not_permitted(self.path) from error
        except TimeoutError as error:
            raise no_answer(self.path, timeout_s) from error
        except (http.client.HTTPException, ConnectionError) as error:
            raise CommandError(
                f"the daemon broke off: {type(error).__name__}", Exit.UNREACHABLE
            ) from error
        finally:
            connection.close()


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
