"""Capabilities of other nodes, over the peer streams; and the other side of it, serving their calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from meshd.orchestrate.access_guard import Source, check_departure
from meshd.orchestrate.audit import Audit
from meshd.orchestrate.callers import Caller, Passports, id_text
from meshd.orchestrate.decoding import Malformed, mapping
from meshd.orchestrate.distance import reach_of_host
from meshd.orchestrate.host import CapabilityHost, Emit
from meshd.orchestrate.plugin_peers import next_bytes, told
from meshd.orchestrate.router import Target
from meshd.orchestrate.wire import chunk_from_value, chunk_to_value, done_from_value, done_to_value
from meshd.shell.streams import (
    CallHeader,
    IncomingCall,
    OutgoingCall,
    PeerStreams,
    RemoteFailed,
    RemoteRefused,
    StreamError,
    UnsendableError,
)
from meshd_cms import NodeId
from meshd_plugins.api import (
    BadRequest,
    CapabilityError,
    Chunk,
    Done,
    Logger,
    Operation,
    Privacy,
    Refused,
    Request,
    Value,
)

_CLASSES = {int(level): level.name.lower() for level in Privacy}


class PeerCapabilities:
    """Implements `Remote` of the router over the peer streams.

    Args:
        streams: to the peers.
        passports: prove there who asks.
        audit: is told of what left this node.
        name_of: what a peer is called, for the audit.
    """

    def __init__(
        self,
        streams: PeerStreams,
        passports: Passports,
        audit: Audit,
        name_of: Callable[[NodeId], str] = lambda _node: "",
    ) -> None:
        self._streams = streams
        self._passports = passports
        self._audit = audit
        self._name_of = name_of

    async def invoke(self, target: Target, request: Request, caller: Caller, emit: Emit) -> Done:
        """Run a request on a peer. Leaving early, by an error of ours too, cancels it there.

        Raises:
            Refused: as the peer says; `too_large` when the request does not fit a frame; `privacy` when
                it may not go there. Nothing was done there.
            BadRequest: as the peer says; `unsendable` when the body is not made of plain values.
            Failed: as the peer says; `unreachable` when nothing was sent; `stream_lost` when the
                connection broke; `peer_fault` when the peer said what makes no sense.
        """
        check_departure(request.privacy, target.address[0])
        header = CallHeader(
            request_id=request.request_id,
            name=request.name,
            capability_id=target.capability_id,
            operation=str(request.operation),
            caller=caller.node,
            principal=caller.principal,
            passport=self._passports.of(caller, request),
            privacy=int(request.privacy),
            trace=request.trace,
            remaining_s=request.deadline_s,
            hops=request.hops,
            idempotency_id=request.idempotency_id,
            tags=request.tags,
            hint=target.hint,
        )
        with told():
            async with self._streams.call(
                target.owner,
                target.address,
                header,
                request.body,
                check=partial(check_departure, request.privacy),
            ) as call:
                return await self._answered(call, target, header, caller, emit)

    async def _answered(
        self,
        call: OutgoingCall,
        target: Target,
        header: CallHeader,
        caller: Caller,
        emit: Emit,
    ) -> Done:
        """The answer to a request that has left this node, which is noted however it ends."""
        outcome = "cancelled"
        try:
            while (value := await call.receive()) is not None:
                await emit(chunk_from_value(value))
            done = done_from_value(call.trailer)
            outcome = "ok"
            return done
        except (RemoteRefused, RemoteFailed, CapabilityError) as error:
            outcome = error.code
            raise
        except StreamError:
            outcome = "stream_lost"
            raise
        finally:
            self._audit.record(
                "left",
                to=id_text(target.owner),
                to_name=self._name_of(target.owner),
                capability=target.capability_id,
                privacy=Privacy(header.privacy).name.lower(),
                caller=str(caller),
                request=header.request_id,
                bytes=call.sent_bytes,
                pieces=1,
                outcome=outcome,
            )


class CallServer:
    """Serves the calls of peers from the capabilities of this node.

    Args:
        host: runs them.
        hops_max: forwards after which a call is refused as going in circles.
        log: one canonical line is written for each call.
        passports: check who asks.
        audit: is told of what this node did for others.
        name_of: what a peer is called, for the audit.
    """

    def __init__(
        self,
        host: CapabilityHost,
        *,
        hops_max: int,
        log: Logger,
        passports: Passports,
        audit: Audit,
        name_of: Callable[[NodeId], str] = lambda _node: "",
    ) -> None:
        self._host = host
        self._hops_max = hops_max
        self._log = log
        self._passports = passports
        self._audit = audit
        self._name_of = name_of

    async def serve(self, call: IncomingCall) -> Value:
        """Run one call; returns its trailer.

        Raises:
            Refused, BadRequest, Failed: what the peer is told.
        """
        began_s = trio.current_time()
        outcome = "internal"
        caller: Caller | None = None
        pieces = 0

        async def emit(chunk: Chunk) -> None:
            nonlocal pieces
            await call.send(chunk_to_value(chunk))
            pieces += 1

        try:
            caller = self._passports.read(call.header, call.peer)
            request = self._request(call, caller)
            source = Source(caller, call.peer, reach_of_host(call.host), call.header.hint)
            done = await self._host.invoke(call.header.capability_id, request, emit, source)
            outcome = "ok"
            return done_to_value(done)
        except (CapabilityError, UnsendableError) as error:
            outcome = error.code
            raise
        except trio.Cancelled:
            outcome = "cancelled"
            raise
        finally:
            self._log.info(
                "call.served",
                request_id=call.header.request_id,
                capability=call.header.capability_id,
                peer=id_text(call.peer),
                outcome=outcome,
                hops=call.header.hops,
                total_ms=round((trio.current_time() - began_s) * 1e3, 1),
            )
            self._note(call, caller, pieces, outcome)

    def _note(self, call: IncomingCall, caller: Caller | None, pieces: int, outcome: str) -> None:
        header = call.header
        self._audit.record(
            "served",
            to=id_text(call.peer),
            to_name=self._name_of(call.peer),
            capability=header.capability_id,
            privacy=_CLASSES.get(header.privacy, "unknown"),
            caller=str(caller) if caller is not None else "unproven",
            request=header.request_id,
            bytes=call.sent_bytes,
            pieces=pieces,
            outcome=outcome,
        )

    def _request(self, call: IncomingCall, caller: Caller) -> Request:
        header = call.header
        if self._host.draining:
            raise Refused("this node is stopping", code="draining")
        if header.hops > self._hops_max:
            raise Refused(
                f"forwarded {header.hops} times, {self._hops_max} are allowed", code="hop_limit"
            )
        try:
            operation = Operation(header.operation)
            return Request(
                request_id=header.request_id,
                name=header.name,
                operation=operation,
                body=mapping(call.body, "body"),
                caller=str(caller),
                privacy=Privacy(header.privacy),
                trace=header.trace,
                idempotency_id=header.idempotency_id,
                hops=header.hops,
                deadline_s=header.remaining_s,
                tags=header.tags,
                incoming=partial(next_bytes, call) if operation is Operation.TUNNEL else None,
            )
        except (Malformed, ValueError) as error:
            raise BadRequest(f"the call is malformed: {error}", code="malformed_call") from error
