"""What one worker keeps of the requests that it served: told, handed out, taken in.

Implements `meshd_plugins.api.PrefixHolder` over calls to the worker. The worker keeps whose each state is, and
the narrowest class of the requests that made it; both come with what it hands out, and are checked here and by
the daemon. What a worker says is bounded and checked like anything that comes from outside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    suppress,
)
from typing import Final

import trio

from meshd_plugins.api import (
    CapabilityError,
    Failed,
    PrefixExport,
    PrefixHead,
    Privacy,
    Refused,
    Value,
    WarmPrefix,
    Worker,
    WorkerCall,
)

TAG_BYTES: Final = 8
WARM_MAX: Final = 64  # of what a worker says it keeps
EXPORT_BYTES_MAX: Final = 1 << 30
"""Of one state: what is read ahead of the line lies in the daemon's memory."""
PIECE_BYTES_MAX: Final = 1 << 20
GATHERED_BYTES: Final = 512 * 1024
"""Of an import in one call to the worker. Up: less work a byte; it begins later."""
AHEAD_CALLS: Final = 16
"""Calls of an import that wait for the worker: it takes them between two steps."""
AGAIN_S: Final = 5.0  # until the worker is asked for its status again, when that call ended
ABORT_S: Final = 1.0
_DIGEST_BYTES: Final = 32


def keeps_prefixes(hello: Mapping[str, Value]) -> bool:
    """Whether a worker hands states over at all."""
    return kv_bytes_per_token(hello) > 0


def kv_bytes_per_token(hello: Mapping[str, Value]) -> int:
    """What a token of a state takes, as a worker says; 0: it hands none over."""
    found = hello.get("kv_bytes_per_token", 0)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= 1 << 30:
        return 0
    return found


class WarmPrefixes:
    """The states of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._warm: tuple[WarmPrefix, ...] = ()
        self.status: Mapping[str, Value] = {}
        """What the worker last said of how busy it is."""

    async def run(self) -> None:
        """Listen to what the worker keeps, until cancelled."""
        while keeps_prefixes(self._worker.hello):
            try:
                async with self._worker.call({"operation": "status"}) as call:
                    while (item := await call.receive()) is not None:
                        self.status = item
                        self._warm = read_warm(item.get("warm"))
            except CapabilityError:
                pass  # it ended, or has too much to do: whoever runs workers sees to that
            self._warm = ()
            await trio.sleep(AGAIN_S)

    def warm(self) -> Sequence[WarmPrefix]:
        """What is kept, the most recently used first."""
        return self._warm

    def export_prefix(
        self, tag: bytes, caller: str, away: Privacy
    ) -> AbstractAsyncContextManager[PrefixExport]:
        """Hand a state out; see `meshd_plugins.api.PrefixHolder`."""
        return self._export(tag, caller, away)

    @asynccontextmanager
    async def _export(
        self, tag: bytes, caller: str, away: Privacy
    ) -> AsyncGenerator[PrefixExport, None]:
        message: dict[str, Value] = {"operation": "kv_export", "tag": tag, "caller": caller}
        async with self._worker.call(message) as call:
            item = await call.receive()
            head = read_head(item.get("head") if item is not None else None, tag, caller)
            if not away <= head.privacy or head.privacy is Privacy.LOCAL:
                raise Refused("its class keeps it nearer", code="privacy")
            yield _Export(head, call)

    async def import_prefix(self, head: PrefixHead, data: AsyncIterable[bytes]) -> int:
        """Take a state in; see `meshd_plugins.api.PrefixHolder`."""
        answer = await self._ask({"operation": "kv_begin", "head": head_to_wire(head)})
        number = answer.get("import")
        if not isinstance(number, int):
            raise Failed("the worker does not say under which number", code="failed")
        try:
            await self._feed(number, data)
            answer = await self._ask({"operation": "kv_commit", "import": number})
        except BaseException:
            with trio.move_on_after(ABORT_S, shield=True):
                await self._abort(number)
            raise
        tokens = answer.get("tokens")
        return tokens if isinstance(tokens, int) and 0 <= tokens <= head.tokens else head.tokens

    async def _feed(self, number: int, data: AsyncIterable[bytes]) -> None:
        """Pass the bytes on, in order, a bounded number of calls ahead of the worker."""
        ahead: deque[AsyncExitStack] = deque()
        async with AsyncExitStack() as all_calls, aclosing(_gathered(data)) as pieces:
            async for piece in pieces:
                if len(ahead) >= AHEAD_CALLS:
                    await ahead.popleft().aclose()
                one = await all_calls.enter_async_context(AsyncExitStack())
                message: dict[str, Value] = {
                    "operation": "kv_data",
                    "import": number,
                    "data": piece,
                }
                call = await one.enter_async_context(self._worker.call(message))
                one.push_async_callback(_ended, call)
                ahead.append(one)
            while ahead:
                await ahead.popleft().aclose()

    async def _ask(self, message: Mapping[str, Value]) -> Mapping[str, Value]:
        """One question, one answer."""
        async with self._worker.call(message) as call:
            answer = await call.receive()
            await _ended(call)
        return answer or {}

    async def _abort(self, number: int) -> None:
        with suppress(CapabilityError):  # it forgets by itself what is not finished
            await self._ask({"operation": "kv_abort", "import": number})


async def _gathered(data: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes in larger pieces."""
    pieces: list[bytes] = []
    size_bytes = 0
    async for piece in data:
        pieces.append(piece)
        size_bytes += len(piece)
        if size_bytes >= GATHERED_BYTES:
            yield b"".join(pieces)
            pieces.clear()
            size_bytes = 0
    if pieces:
        yield b"".join(pieces)


async def _ended(call: WorkerCall) -> None:
    """Wait for the end of a call. Raises what it ended with."""
    while await call.receive() is not None:
        pass


class _Export:
    """Implements `PrefixExport`."""

    def __init__(self, head: PrefixHead, call: WorkerCall) -> None:
        self.head = head
        self._call = call
        self._left = head.size_bytes

    async def receive(self) -> bytes | None:
        item = await self._call.receive()
        if item is None:
            if self._left:
                raise Failed("the worker's state is shorter than it said", code="failed")
            return None
        data = item.get("data")
        if not isinstance(data, bytes) or not 0 < len(data) <= min(self._left, PIECE_BYTES_MAX):
            raise Failed("the worker's state is not what it said", code="failed")
        self._left -= len(data)
        return data


def read_warm(value: Value) -> tuple[WarmPrefix, ...]:
    """What a worker says it keeps; what makes no sense is passed over."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return ()
    found: list[WarmPrefix] = []
    for pair in value[:WARM_MAX]:
        if not isinstance(pair, Sequence) or isinstance(pair, str | bytes) or len(pair) != 2:
            continue
        tag, tokens = pair
        if not isinstance(tag, bytes) or len(tag) != TAG_BYTES or not isinstance(tokens, int):
            continue
        if 0 < tokens < 2**31:
            found.append(WarmPrefix(tag, tokens))
    return tuple(found)


def read_head(value: Value, tag: bytes, caller: str) -> PrefixHead:
    """What a worker says of a state. Raises Failed."""
    table: Mapping[str, Value] = value if isinstance(value, Mapping) else {}
    token_ids, digest = table.get("tokens"), table.get("hash")
    size_bytes, privacy = table.get("bytes"), table.get("privacy")
    if (
        not isinstance(token_ids, bytes)
        or not token_ids
        or len(token_ids) % 4
        or len(token_ids) > PIECE_BYTES_MAX
        or not isinstance(digest, bytes)
        or len(digest) != _DIGEST_BYTES
        or not isinstance(size_bytes, int)
        or not 0 < size_bytes <= EXPORT_BYTES_MAX
    ):
        raise Failed("the worker says nonsense of a state", code="failed")
    classes = {int(each): each for each in Privacy}
    return PrefixHead(
        tag=tag,
        caller=caller,
        # Without a class it stays where it is.
        privacy=classes.get(privacy, Privacy.LOCAL) if isinstance(privacy, int) else Privacy.LOCAL,
        token_ids=token_ids,
        size_bytes=size_bytes,
        digest=digest,
    )


def head_to_wire(head: PrefixHead) -> dict[str, Value]:
    """For the worker that takes a state in."""
    return {
        "tag": head.tag,
        "caller": head.caller,
        "privacy": int(head.privacy),
        "tokens": head.token_ids,
        "bytes": head.size_bytes,
        "hash": head.digest,
    }
