"""Capabilities of other nodes, over the peer streams; and the other side of it, serving their calls."""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshd.core.effects import Address
from meshd.orchestrate.decoding import Malformed, mapping
from meshd.orchestrate.host import CapabilityHost, Emit
from meshd.orchestrate.wire import chunk_from_value, chunk_to_value, done_from_value, done_to_value
from meshd.shell.streams import (
    CallHeader,
    FrameTooLarge,
    IncomingCall,
    PeerStreams,
    PeerUnreachable,
    RemoteFailed,
    RemoteRefused,
    StreamError,
    UnsendableError,
)
from meshd_cms import NodeId, node_id_text
from meshd_plugins.api import (
    BadRequest,
    CapabilityError,
    Chunk,
    Done,
    Failed,
    Logger,
    Operation,
    Privacy,
    Refused,
    Request,
    Value,
)


class PeerCapabilities:
    """Implements `Remote` of the router over the peer streams."""

    def __init__(self, streams: PeerStreams) -> None:
        self._streams = streams

    async def invoke(
        self, owner: NodeId, address: Address, capability_id: str, request: Request, emit: Emit
    ) -> Done:
        """Run a request on a peer. Leaving early, by an error of ours too, cancels it there.

        Raises:
            Refused: as the peer says; `too_large` when the request does not fit a frame. Nothing was
                done there.
            BadRequest: as the peer says; `unsendable` when the body is not made of plain values.
            Failed: as the peer says; `unreachable` when nothing was sent; `stream_lost` when the
                connection broke; `peer_fault` when the peer said what makes no sense.
        """
        header = CallHeader(
            request_id=request.request_id,
            name=request.name,
            capability_id=capability_id,
            operation=str(request.operation),
            caller=bytes.fromhex(request.caller),
            privacy=int(request.privacy),
            trace=request.trace,
            remaining_s=request.deadline_s,
            hops=request.hops,
            idempotency_id=request.idempotency_id,
        )
        try:
            async with self._streams.call(owner, address, header, request.body) as call:
                while (value := await call.receive()) is not None:
                    await emit(chunk_from_value(value))
                return done_from_value(call.trailer)
        except RemoteRefused as refusal:
            raise Refused(refusal.message, code=refusal.code) from refusal
        except RemoteFailed as failure:
            kind = BadRequest if failure.callers_fault else Failed
            raise kind(failure.message, code=failure.code) from failure
        except PeerUnreachable as error:
            raise Failed(error.message, code=PeerUnreachable.code) from error
        except StreamError as error:
            raise Failed(error.message, code="stream_lost") from error
        except FrameTooLarge as error:
            raise Refused(str(error), code="too_large") from error
        except UnsendableError as error:
            raise BadRequest(str(error), code=error.code) from error


class CallServer:
    """Serves the calls of peers from the capabilities of this node.

    Args:
        host: runs them.
        hops_max: forwards after which a call is refused as going in circles.
        log: one canonical line is written for each call.
        reach_of: how far away a peer is; without it nobody counts as being on the LAN.
    """

    def __init__(
        self,
        host: CapabilityHost,
        *,
        hops_max: int,
        log: Logger,
        reach_of: Callable[[NodeId], Privacy] = lambda _peer: Privacy.MESH,
    ) -> None:
        self._host = host
        self._hops_max = hops_max
        self._log = log
        self._reach_of = reach_of

    async def serve(self, call: IncomingCall) -> Value:
        """Run one call; returns its trailer.

        Raises:
            Refused, BadRequest, Failed: what the peer is told.
        """
        began_s = trio.current_time()
        outcome = "internal"

        async def emit(chunk: Chunk) -> None:
            await call.send(chunk_to_value(chunk))

        try:
            request = self._request(call)
            done = await self._host.invoke(call.header.capability_id, request, emit)
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
                peer=node_id_text(call.peer),
                outcome=outcome,
                hops=call.header.hops,
                total_ms=round((trio.current_time() - began_s) * 1e3, 1),
            )

    def _request(self, call: IncomingCall) -> Request:
        header = call.header
        if self._host.draining:
            raise Refused("this node is stopping", code="draining")
        if header.hops > self._hops_max:
            raise Refused(
                f"forwarded {header.hops} times, {self._hops_max} are allowed", code="hop_limit"
            )
        descriptor = self._host.descriptor(header.capability_id)
        if descriptor is not None and self._reach_of(call.peer) > descriptor.privacy:
            allowed = descriptor.privacy.name.lower()
            raise Refused(
                f"{header.capability_id} may be called from {allowed} only", code="privacy"
            )
        try:
            return Request(
                request_id=header.request_id,
                name=header.name,
                operation=Operation(header.operation),
                body=mapping(call.body, "body"),
                caller=(header.caller or call.peer).hex(),
                privacy=Privacy(header.privacy),
                trace=header.trace,
                idempotency_id=header.idempotency_id,
                hops=header.hops,
                deadline_s=header.remaining_s,
            )
        except (Malformed, ValueError) as error:
            raise BadRequest(f"the call is malformed: {error}", code="malformed_call") from error
