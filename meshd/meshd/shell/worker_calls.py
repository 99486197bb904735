"""One call of a worker, as it waits for its answers."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from meshd_plugins.api import CapabilityError, Value


class PendingCall:
    """Implements `WorkerCall`: a queue of messages that is bounded in number and bytes, and how it ended."""

    def __init__(self, call_id: int, messages_max: int, bytes_max: int) -> None:
        self.id = call_id
        self.ended = False
        self._error: CapabilityError | None = None
        self._bytes_max = bytes_max
        self._unread_bytes = 0
        self._send, self._receive = trio.open_memory_channel[tuple[Mapping[str, Value], int]](
            messages_max
        )

    async def receive(self) -> Mapping[str, Value] | None:
        """Next message, None at the end; raises how it failed, after what came before that."""
        try:
            message, size_bytes = await self._receive.receive()
        except trio.EndOfChannel:
            if self._error is not None:
                raise self._error from None
            return None
        self._unread_bytes -= size_bytes
        return message

    def put(self, message: Mapping[str, Value], size_bytes: int) -> bool:
        """Queue a message for the caller; False when it does not keep up. A single one is always taken."""
        unread_bytes = self._unread_bytes + size_bytes
        if self._unread_bytes and unread_bytes > self._bytes_max:
            return False
        try:
            self._send.send_nowait((message, size_bytes))
        except trio.WouldBlock:
            return False
        self._unread_bytes = unread_bytes
        return True

    def end(self, error: CapabilityError | None = None) -> None:
        """Let the caller see the end once it has read what is queued."""
        if not self.ended:
            self.ended = True
            self._error = error
            self._send.close()

    def close(self) -> None:
        """The caller is gone."""
        self.end()
        self._receive.close()
