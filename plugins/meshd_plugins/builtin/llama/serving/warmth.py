"""What one worker keeps of the requests that it served: told, handed out, taken in.

Implements `meshd_plugins.api.PrefixHolder` over calls to the worker. The worker keeps whose each state is, and
the narrowest class of the requests that made it; both come with what it hands out, and are checked here and by
the daemon. What a worker says is bounded and checked like anything that comes from outside.

A state flows through the daemon: the worker is asked for a piece when there is room for one, on either way, so
that `AHEAD_BYTES` of it are here at most, however large it is and however slow who takes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
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
STATE_BYTES_MAX: Final = 1 << 30
HEAD_BYTES_MAX: Final = 1 << 20  # of its token ids
PIECE_BYTES: Final = 512 * 1024
"""Of a state in one call to the worker. Up: less work a byte, more memory."""
AHEAD_BYTES: Final = 8 * PIECE_BYTES
"""Of one state here in the daemon: what the worker was asked for, or given. It answers between two steps, so a
state crosses at this much a step. Up: faster while the model works, more memory."""
AHEAD_CALLS: Final = AHEAD_BYTES // PIECE_BYTES
ANSWER_S: Final = 30.0
"""For one answer of the worker: it has others to serve, and copies a large state in one go."""
AGAIN_S: Final = 5.0  # until the worker is asked for its status again, when that call ended
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
        """Listen to how the worker is and what it keeps, until cancelled."""
        keeps = keeps_prefixes(self._worker.hello)
        while True:
            try:
                async with self._worker.call({"operation": "status"}) as call:
                    while (item := await call.receive()) is not None:
                        self.status = item
                        self._warm = read_warm(item.get("warm")) if keeps else ()
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
        # While this call is open the worker holds the state.
        async with self._worker.call(message) as call, AsyncExitStack() as reads:
            with _answering():
                item = await call.receive() or {}
            head = read_head(item.get("head"), tag, caller)
            if not away <= head.privacy or head.privacy is Privacy.LOCAL:
                raise Refused("its class keeps it nearer", code="privacy")
            number = item.get("export")
            if not isinstance(number, int):
                raise Failed("the worker does not say under which number", code="failed")
            yield _Export(head, self._worker, number, reads)

    async def import_prefix(self, head: PrefixHead, data: AsyncIterable[bytes]) -> int:
        """Take a state in; see `meshd_plugins.api.PrefixHolder`."""
        message: dict[str, Value] = {"operation": "kv_begin", "head": head_to_wire(head)}
        # While this call is open the worker has room for the state.
        async with self._worker.call(message) as call:
            with _answering():
                begun = await call.receive() or {}
            number = begun.get("import")
            if not isinstance(number, int):
                raise Failed("the worker does not say under which number", code="failed")
            await self._feed(number, data)
            answer = await self._ask({"operation": "kv_commit", "import": number})
        tokens = answer.get("tokens")
        return tokens if isinstance(tokens, int) and 0 <= tokens <= head.tokens else head.tokens

    async def _feed(self, number: int, data: AsyncIterable[bytes]) -> None:
        """Pass the bytes on, in order, a bounded number of calls ahead of the worker."""
        ahead: deque[_Asked] = deque()
        async with AsyncExitStack() as calls, aclosing(_gathered(data)) as pieces:
            async for piece in pieces:
                if len(ahead) >= AHEAD_CALLS:
                    await ahead.popleft().answered()
                message: dict[str, Value] = {
                    "operation": "kv_data",
                    "import": number,
                    "data": piece,
                }
                ahead.append(await _Asked.begin(self._worker, message, calls))
            while ahead:
                await ahead.popleft().answered()

    async def _ask(self, message: Mapping[str, Value]) -> Mapping[str, Value]:
        """One question, one answer."""
        async with self._worker.call(message) as call:
            with _answering():
                answer = await call.receive()
                await _ended(call)
        return answer or {}


@contextmanager
def _answering() -> Generator[None, None, None]:
    """Raise Failed when the worker takes longer than it may for an answer."""
    try:
        with trio.fail_after(ANSWER_S):
            yield
    except trio.TooSlowError:
        text = f"the worker has not answered for {ANSWER_S:g} s"
        raise Failed(text, code="deadline_exceeded") from None


async def _gathered(data: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes in larger pieces."""
    gathered = bytearray()
    async for piece in data:
        gathered += piece
        if len(gathered) >= PIECE_BYTES:
            whole = bytes(gathered)
            gathered.clear()
            yield whole
    if gathered:
        yield bytes(gathered)


async def _ended(call: WorkerCall) -> None:
    """Wait for the end of a call. Raises what it ended with."""
    while await call.receive() is not None:
        pass


@dataclass(frozen=True, slots=True)
class _Asked:
    """A call of one answer at most that is not waited for yet."""

    call: WorkerCall
    leave: AsyncExitStack

    @classmethod
    async def begin(
        cls, worker: Worker, message: Mapping[str, Value], calls: AsyncExitStack
    ) -> _Asked:
        """Send it; it is left with `calls` at the latest."""
        leave = await calls.enter_async_context(AsyncExitStack())
        return cls(await leave.enter_async_context(worker.call(message)), leave)

    async def answered(self) -> Mapping[str, Value]:
        """Wait for its end, and leave it."""
        with _answering():
            answer = await self.call.receive()
            if answer is not None:
                await _ended(self.call)
        await self.leave.aclose()
        return answer or {}


class _Export:
    """Implements `PrefixExport`: the pieces are asked for as they are taken, a bounded number ahead."""

    def __init__(
        self, head: PrefixHead, worker: Worker, number: int, reads: AsyncExitStack
    ) -> None:
        self.head = head
        self._worker = worker
        self._number = number
        self._reads = reads
        self._asked_bytes = 0
        self._ahead: deque[tuple[int, _Asked]] = deque()  # bytes, and the call for them

    async def receive(self) -> bytes | None:
        """The next piece; that it is asked for says that the one before it is taken."""
        try:
            while len(self._ahead) < AHEAD_CALLS and self._asked_bytes < self.head.size_bytes:
                await self._ask()
            if not self._ahead:
                return None
            size, asked = self._ahead.popleft()
            data = (await asked.answered()).get("data")
        except Refused as refused:  # it has begun: nobody else is asked for the rest
            raise Failed(refused.message, code="failed") from refused
        if not isinstance(data, bytes) or len(data) != size:
            raise Failed("the worker's state is not what it said", code="failed")
        return data

    async def _ask(self) -> None:
        size = min(PIECE_BYTES, self.head.size_bytes - self._asked_bytes)
        message: dict[str, Value] = {
            "operation": "kv_read",
            "export": self._number,
            "at": self._asked_bytes,
            "bytes": size,
        }
        self._ahead.append((size, await _Asked.begin(self._worker, message, self._reads)))
        self._asked_bytes += size


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
        or len(token_ids) > HEAD_BYTES_MAX
        or not isinstance(digest, bytes)
        or len(digest) != _DIGEST_BYTES
        or not isinstance(size_bytes, int)
        or not 0 < size_bytes <= STATE_BYTES_MAX
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
