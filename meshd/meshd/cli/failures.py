"""How a command fails: one line on standard error, and an exit status that scripts can tell apart."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from meshd_plugins.api import Value


class Exit(IntEnum):
    """Exit statuses; docs/cli.md explains them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_SERVED = 4
    REFUSED = 5
    DEADLINE = 6
    BROKEN = 7
    INTERRUPTED = 130


_EXIT_OF_STATUS: Mapping[int, Exit] = {
    400: Exit.USAGE,
    401: Exit.REFUSED,
    403: Exit.REFUSED,
    404: Exit.NOT_SERVED,
    413: Exit.USAGE,
    429: Exit.REFUSED,
    503: Exit.REFUSED,
    504: Exit.DEADLINE,
}


class CommandError(click.ClickException):
    """A command failed; the message says what to do where something can be done."""

    def __init__(self, message: str, exit_status: Exit) -> None:
        super().__init__(message)
        self.exit_code = int(exit_status)  # type: ignore[misc]  # click's own subclasses do it too

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it for people."""
        click.echo(f"meshd: {self.message}", file=file or sys.stderr)


class ServerError(CommandError):
    """The daemon answered with an error: `error` is what stands in its body."""

    def __init__(self, status: int, error: Mapping[str, Value], *, begun: bool = False) -> None:
        exit_status = Exit.BROKEN if begun else _EXIT_OF_STATUS.get(status, Exit.FAILED)
        message = str(error.get("message") or f"the daemon answered {status}")
        super().__init__(message + ("; the answer is not complete" if begun else ""), exit_status)
        self.status = status
        self.error = error

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it, with a caret under the column where a name is malformed."""
        text, column = self.error.get("text"), self.error.get("column")
        if self.status == 400 and isinstance(text, str) and isinstance(column, int):
            shown = "".join(c if c.isprintable() else "?" for c in text[:200])
            click.echo(f"  {shown}\n  {' ' * (min(column, 201) - 1)}^", file=file or sys.stderr)
        super().show(file)


def not_running(path: Path) -> CommandError:
    """Nobody listens on the socket."""
    return CommandError(
        f"meshd is not running (no socket at {path}): start it with `meshd run` or "
        "`systemctl start meshd`; for one on another machine see `meshd --url`",
        Exit.UNREACHABLE,
    )


def not_permitted(path: Path) -> CommandError:
    """The socket is there, and not for this user."""
    user = os.environ.get("USER") or "$USER"
    return CommandError(
        f"this user may not use {path}: you are not in group meshd: "
        f"sudo usermod -aG meshd {user}, then log in again",
        Exit.UNREACHABLE,
    )


def no_answer(where: str, seconds: float) -> CommandError:
    """Somebody holds the socket, or the port, and says nothing."""
    return CommandError(
        f"the daemon on {where} does not answer within {seconds:g} s; `journalctl -u meshd` may say why",
        Exit.UNREACHABLE,
    )
