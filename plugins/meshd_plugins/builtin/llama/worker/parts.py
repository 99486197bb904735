"""What a worker process consists of: parts that answer calls, driven in turn by one loop."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn, Protocol, assert_never

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.models.digest import Mark
from meshd_plugins.workerkit import Call, Cancel, Closed, Incoming, Link, Woken

EXIT_MODEL_UNUSABLE: Final = 4
EXIT_MODEL_CHANGED: Final = 5
EXIT_MEDIA: Final = 6
IDLE_WAIT_S: Final = 1.0


class BadCall(Exception):
    """The caller's fault; becomes an error of kind bad_request."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Part(Protocol):
    """Answers the calls of some operations."""

    @property
    def operations(self) -> Sequence[str]:
        """Values of a call's `operation` that are its own."""
        ...

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        ...

    def take(self, call_id: int, message: Mapping[str, Value]) -> None:
        """Begin a call. Raises BadCall."""
        ...

    def cancel(self, call_id: int) -> None:
        """Nobody waits for a call any more. Calls that are not its own are ignored."""
        ...

    def step(self) -> None:
        """Do a bounded amount of work, some tenths of a second at most; called in every turn."""
        ...


class Service:
    """The loop of the process."""

    def __init__(self, link: Link, parts: Sequence[Part], file: int, mark: Mark) -> None:
        """Serve `parts`; `file` is the model's, and `mark` what it was like when it was verified."""
        self._link = link
        self._parts = parts
        self._by_operation = {name: part for part in parts for name in part.operations}
        self._file = file
        self._mark = mark

    def run(self) -> None:
        """Serve until the daemon closes the link."""
        while True:
            busy = any(part.busy for part in self._parts)
            incoming = self._link.receive(0.0 if busy else IDLE_WAIT_S)
            while incoming is not None:
                if isinstance(incoming, Closed):
                    return
                self._take(incoming)
                incoming = self._link.receive(0.0)
            for part in self._parts:
                part.step()
            self._link.flush()
            self._link.heartbeat()
            # It is mapped, not copied: what is written into the file is computed with.
            if not self._mark.holds_the_same(Mark.of(self._file)):
                fail(EXIT_MODEL_CHANGED, "the model's file was written to while in use")

    def _take(self, incoming: Incoming) -> None:
        match incoming:
            case Call(id=call_id, message=message):
                operation = str(message.get("operation"))
                part = self._by_operation.get(operation)
                if part is None:
                    text = f"this model cannot {operation[:40]}"
                    self._link.error(call_id, "refused", "unsupported", text)
                    return
                try:
                    part.take(call_id, message)
                except BadCall as error:
                    self._link.error(call_id, "bad_request", error.code, str(error))
            case Cancel(id=call_id):
                for part in self._parts:
                    part.cancel(call_id)
            case Woken() | Closed():
                pass
            case _:
                assert_never(incoming)


def fail(status: int, why: str) -> NoReturn:
    """End the process; the daemon shows the last lines of its stderr."""
    os.write(2, f"{why}\n".encode())
    os._exit(status)
