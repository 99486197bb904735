"""The asking half of a hand-over: a prefix is fetched before the request is served that needs it.

Whatever goes wrong the prefix is computed as if nothing had been offered: `PrefixFetcher.warm` raises nothing.
What a hint says is only what the node that sent the request says; what comes is only what the peer says. Both are
bounded by what was decided here (`meshd.core.handoff`) and checked before the capability puts it to use.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Final

import trio

from meshd.core.frames import CallHeader, WarmHint
from meshd.core.handoff import HandoffConfig, Links, Plan, Prospect, Reason, choose, is_too_slow
from meshd.orchestrate.access_guard import Source, check_departure
from meshd.orchestrate.callers import Caller, Passports, id_text
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.decoding import Malformed, count, mapping, typed
from meshd.orchestrate.handoff import (
    CLASS_FIELD,
    DIGEST_BYTES,
    DIGEST_FIELD,
    EXPORT,
    IDS_FIELD,
    KEY_FIELD,
    KV_ID,
    MOST_FIELD,
    SIZE_FIELD,
    TAG_FIELD,
    HandoffStatistics,
)
from meshd.shell.streams import (
    OutgoingCall,
    PeerStreams,
    PeerUnreachable,
    RemoteFailed,
    RemoteRefused,
    StreamError,
)
from meshd_cms import NodeId
from meshd_plugins.api import (
    Capability,
    CapabilityError,
    Descriptor,
    Failed,
    Logger,
    PrefixHead,
    PrefixHolder,
    Privacy,
    Refused,
    Request,
    Value,
)

FETCHED_MAX: Final = 2
"""States that are fetched at once."""
WHY_CHARS_MAX: Final = 200  # of a refusal, in the log

_FETCHED: Final = "fetched"


class GivenUp(Failed):
    """A fetch was given up here. State: nothing of it is kept."""

    code = "given_up"

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Fetch:
    """One that was decided on."""

    holder: PrefixHolder
    kv_key: str
    hint: WarmHint
    plan: Plan
    address: tuple[str, int]
    bytes_per_token: int
    began_s: float


class PrefixFetcher:
    """Fetches what is warm elsewhere before a request is served here.

    Args:
        me: this node.
        streams: to the peers.
        catalogue: knows them.
        passports: prove there who asks.
        config: of the choice.
        links: how fast they hand over, learnt here.
        statistics: counted here.
        log: one line for each fetch.
    """

    def __init__(
        self,
        me: NodeId,
        streams: PeerStreams,
        catalogue: Catalogue,
        passports: Passports,
        config: HandoffConfig,
        links: Links,
        statistics: HandoffStatistics,
        log: Logger,
    ) -> None:
        self._me = me
        self._streams = streams
        self._catalogue = catalogue
        self._passports = passports
        self._config = config
        self._links = links
        self._log = log
        self._running = 0
        self.statistics = statistics

    async def warm(
        self, capability: Capability, descriptor: Descriptor, request: Request, source: Source
    ) -> None:
        """Fetch what the hint of a request names, if that is faster than to compute it."""
        hint, model = source.hint, descriptor.model
        if hint is None or model is None or not model.kv_key:
            return
        if not isinstance(capability, PrefixHolder):
            return
        try:
            chosen = self._choose(capability, descriptor, request, hint)
        except Exception as error:  # noqa: BLE001 - a plugin's code says what is warm
            self._log.error("capability.crashed", error=type(error).__qualname__)
            chosen = Reason.BROKEN
        if isinstance(chosen, Reason):
            self.statistics.count(chosen.value)
            return
        self._running += 1
        outcome, why = "cancelled", ""
        tokens = 0
        try:
            tokens = await self._fetched(chosen, request, source.caller)
            outcome = _FETCHED
        except GivenUp as error:
            outcome, why = error.reason.value, error.message[:WHY_CHARS_MAX]
        finally:
            self._running -= 1
            self.statistics.count(outcome)
            self.statistics.fetched_tokens += tokens
            self._log.info(
                "prefix.fetched",
                request_id=request.request_id,
                peer=id_text(hint.node),
                outcome=outcome,
                why=why,
                tokens=tokens,
                expected_ms=round(chosen.plan.expected_s * 1e3, 1),
                total_ms=round((trio.current_time() - chosen.began_s) * 1e3, 1),
            )

    def _choose(
        self, holder: PrefixHolder, descriptor: Descriptor, request: Request, hint: WarmHint
    ) -> _Fetch | Reason:
        """What to do about a hint, which is only what the node that sent the request says."""
        model, node, now_s = descriptor.model, hint.node, trio.current_time()
        assert model is not None, "looked at before"
        if not self._config.enable:
            return Reason.OFF
        if request.privacy is Privacy.LOCAL:
            return Reason.PRIVACY
        address = self._catalogue.address_of(node)
        offered = any(offer.owner == node for offer in self._catalogue.holders(model.kv_key))
        if node == self._me or address is None or not offered:
            return Reason.NOT_THERE
        if self._running >= FETCHED_MAX:
            return Reason.BUSY
        here = [prefix.tokens for prefix in holder.warm() if prefix.tag in request.tags]
        round_trip_s = self._catalogue.round_trip_of(node)
        rates = descriptor.rates
        prospect = Prospect(
            tokens=hint.tokens,
            tokens_here=max(here, default=0),
            bytes_per_token=model.kv_bytes_per_token,
            prefill_tokens_per_s=rates.prefill_tokens_per_s if rates is not None else 0.0,
            link_bytes_per_s=self._links.bytes_per_s(node, round_trip_s, now_s),
            round_trip_s=round_trip_s or 0.0,
        )
        plan = choose(prospect, self._config)
        if isinstance(plan, Reason):
            return plan
        return _Fetch(holder, model.kv_key, hint, plan, address, model.kv_bytes_per_token, now_s)

    async def _fetched(self, fetch: _Fetch, request: Request, caller: Caller) -> int:
        """Fetch it; returns tokens. Raises GivenUp."""
        try:
            watch = _Watch(fetch)
            with watch.scope:
                return await self._asked(fetch, request, caller, watch)
            raise GivenUp(Reason.TIMEOUT, "it was not here in time")
        except GivenUp:
            raise
        except (RemoteRefused, RemoteFailed) as error:
            raise GivenUp(Reason.REFUSED, error.message) from error
        except (PeerUnreachable, StreamError) as error:
            raise GivenUp(Reason.LOST, error.message) from error
        except Refused as error:
            reason = Reason.PRIVACY if error.code == "privacy" else Reason.REFUSED
            raise GivenUp(reason, error.message) from error
        except CapabilityError as error:
            raise GivenUp(Reason.BROKEN, error.message) from error
        except Malformed as error:
            raise GivenUp(Reason.MALFORMED, str(error)) from error
        except Exception as error:
            self._log.error("capability.crashed", error=type(error).__qualname__)
            raise GivenUp(Reason.BROKEN, "the capability crashed on it") from error

    async def _asked(self, fetch: _Fetch, request: Request, caller: Caller, watch: _Watch) -> int:
        check_departure(request.privacy, fetch.address[0])
        header = CallHeader(
            request_id=request.request_id,
            name=request.name,
            capability_id=KV_ID,
            operation=EXPORT,
            caller=caller.node,
            principal=caller.principal,
            passport=self._passports.of(caller, request),
            privacy=int(request.privacy),
            trace=request.trace,
            remaining_s=fetch.plan.deadline_s,
            hops=request.hops,
        )
        body: Value = {
            TAG_FIELD: fetch.hint.tag,
            KEY_FIELD: fetch.kv_key,
            MOST_FIELD: fetch.plan.bytes_max,
        }
        check = partial(check_departure, request.privacy)
        async with self._streams.call(
            fetch.hint.node, fetch.address, header, body, check=check
        ) as call:
            head = _head(await call.receive(), fetch, request)
            carried = _Carried(watch)
            try:
                async with aclosing(_bytes_of(call, head, fetch.plan, carried)) as data:
                    tokens = await fetch.holder.import_prefix(head, data)
            finally:
                self._links.note(
                    fetch.hint.node,
                    carried.bytes,
                    trio.current_time() - fetch.began_s,
                    trio.current_time(),
                )
                self.statistics.fetched_bytes += carried.bytes
            if not carried.whole:
                raise GivenUp(Reason.BROKEN, "the capability did not read it to its end")
            return tokens


class _Watch:
    """Ends a fetch at its deadline, and when nothing moves for too long."""

    def __init__(self, fetch: _Fetch) -> None:
        self._end_s = fetch.began_s + fetch.plan.deadline_s
        self._silence_s = fetch.plan.silence_s
        self.scope = trio.CancelScope()
        self.moved()

    def moved(self) -> None:
        """Something came, or was taken."""
        self.scope.deadline = min(self._end_s, trio.current_time() + self._silence_s)

    def ends(self) -> None:
        """All is here: what is left to do has until the deadline."""
        self.scope.deadline = self._end_s


@dataclass(slots=True)
class _Carried:
    """How far a fetch came."""

    watch: _Watch
    bytes: int = 0
    whole: bool = False


async def _bytes_of(
    call: OutgoingCall, head: PrefixHead, plan: Plan, carried: _Carried
) -> AsyncGenerator[bytes, None]:
    """What comes, as long as it comes fast enough; it ends only if it is what the head says.

    Raises:
        GivenUp: it is not, or it comes too slowly. Malformed: what came are no bytes.
    """
    began_s = trio.current_time()
    digest = blake2b(digest_size=DIGEST_BYTES)
    while (value := await call.receive()) is not None:
        piece = typed(value, bytes, "state")
        carried.bytes += len(piece)
        carried.watch.moved()
        if carried.bytes > head.size_bytes:
            raise GivenUp(Reason.CORRUPT, "it is longer than its head says")
        took_s = trio.current_time() - began_s
        if is_too_slow(plan, head.size_bytes, carried.bytes, took_s):
            raise GivenUp(Reason.SLOW_LINK, "it comes too slowly")
        digest.update(piece)
        yield piece
    if carried.bytes != head.size_bytes or digest.digest() != head.digest:
        raise GivenUp(Reason.CORRUPT, "it is not what its head says")
    carried.whole = True
    carried.watch.ends()


def _head(value: Value | None, fetch: _Fetch, request: Request) -> PrefixHead:
    """Read the first part of an answer. Raises Malformed, GivenUp."""
    table = mapping(value, "head")
    token_ids = typed(table.get(IDS_FIELD), bytes, "token ids")
    digest = typed(table.get(DIGEST_FIELD), bytes, "digest")
    size_bytes, privacy = (
        count(table.get(SIZE_FIELD), "size"),
        count(table.get(CLASS_FIELD), "class"),
    )
    if not token_ids or len(token_ids) % 4 or len(digest) != DIGEST_BYTES:
        raise Malformed("head: token ids or digest of another length")
    if not 0 < size_bytes <= fetch.plan.bytes_max:
        raise Malformed(f"head: {size_bytes} bytes, at most {fetch.plan.bytes_max} are taken")
    tokens = len(token_ids) // 4
    if tokens * fetch.bytes_per_token > 2 * fetch.plan.bytes_max:
        raise Malformed(f"head: {tokens} tokens are more than was said")
    if privacy not in (Privacy.LAN, Privacy.MESH, Privacy.CLOUD):
        raise Malformed("head: no class that leaves a node")
    return PrefixHead(
        tag=fetch.hint.tag,
        caller=request.caller,
        privacy=min(Privacy(privacy), request.privacy),  # a state goes as far as the narrowest
        token_ids=token_ids,
        size_bytes=size_bytes,
        digest=digest,
    )
