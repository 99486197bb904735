"""The other nodes as a plugin sees them: what they announce, and tunnels to it.

A tunnel is one call of the operation `tunnel`, with chunks both ways. It passes the same doors as any call:
this node's rules and the address where it really goes before anything is sent, the peer's guard and its slots
there. It is asked for in the name of this node, never of somebody who asked it something.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Final

from meshd.orchestrate.access_guard import Guard, check_departure
from meshd.orchestrate.audit import Audit
from meshd.orchestrate.callers import Caller, id_text
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.distance import reach_of_host
from meshd.orchestrate.wire import chunk_from_value
from meshd.shell.streams import (
    CallHeader,
    FrameTooLarge,
    IncomingCall,
    OutgoingCall,
    PeerStreams,
    PeerUnreachable,
    RemoteFailed,
    RemoteRefused,
    StreamError,
    UnsendableError,
)
from meshd_cms import NodeId
from meshd_naming import Offer, PeerState
from meshd_plugins.api import (
    BadRequest,
    Failed,
    Operation,
    PeerOffer,
    Privacy,
    Refused,
    Tunnel,
)

PIECE_BYTES: Final = 32 * 1024
"""Of one chunk of a tunnel. Up: fewer frames; what else is on the connection waits longer."""
TUNNEL_S: Final = 10 * 366 * 86_400.0
"""What is asked for as the time of a tunnel: it ends when one end leaves."""


@contextmanager
def told() -> Generator[None]:
    """Errors of a call to a peer become what a plugin or a request is told.

    Raises:
        Refused: as the peer says; `too_large` when the request does not fit a frame. Nothing was done there.
        BadRequest: as the peer says; `unsendable` when the body is not made of plain values.
        Failed: as the peer says; `unreachable` when nothing was sent; `stream_lost` when the connection broke.
    """
    try:
        yield
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


async def next_bytes(call: IncomingCall) -> bytes:
    """What the caller of a tunnel sends next. Raises Failed: `peer_fault`."""
    value = await call.receive()
    if not isinstance(value, bytes) or not value:
        raise Failed("the peer sent something else than bytes into a tunnel", code="peer_fault")
    return value


class PeerTunnel:
    """Implements `meshd_plugins.api.Tunnel` over one call."""

    def __init__(self, call: OutgoingCall) -> None:
        self._call = call

    @property
    def distance(self) -> Privacy:
        """How far away the other end really is."""
        return reach_of_host(self._call.host)

    async def send(self, data: bytes) -> None:
        """Send; see `meshd_plugins.api.Tunnel`."""
        for start in range(0, len(data), PIECE_BYTES):
            if not await self._call.send(data[start : start + PIECE_BYTES]):
                raise Failed("the other end has left the tunnel", code="stream_lost")

    async def receive(self) -> bytes:
        """The next bytes; see `meshd_plugins.api.Tunnel`."""
        with told():
            while (value := await self._call.receive()) is not None:
                if data := chunk_from_value(value).data:
                    return data
        raise Failed("the other end has left the tunnel", code="stream_lost")


class PluginPeers:
    """Implements `meshd_plugins.api.Peers`.

    Args:
        me: this node.
        streams: to the peers.
        catalogue: what they announce.
        guard: this node's rules.
        audit: is told of what left this node.
    """

    def __init__(
        self, me: NodeId, streams: PeerStreams, catalogue: Catalogue, guard: Guard, audit: Audit
    ) -> None:
        self._me = me
        self._streams = streams
        self._catalogue = catalogue
        self._guard = guard
        self._audit = audit
        self._open: dict[int, OutgoingCall] = {}

    def close(self) -> None:
        """End all tunnels: this node is going down, and they would not end by themselves."""
        for call in tuple(self._open.values()):
            call.abandon("this node is going down")

    def offers(self, name: str) -> Sequence[PeerOffer]:
        """What live peers announce under a name; see `meshd_plugins.api.Peers`."""
        found = (offer for offer in self._catalogue.offers() if offer.name.path == name)
        live = (each for each in found if self._is_live(each))
        return sorted(map(self._shown, live), key=lambda each: (each.node_name, each.node))

    def tunnel(self, offer: PeerOffer, privacy: Privacy) -> AbstractAsyncContextManager[Tunnel]:
        """Open a tunnel; see `meshd_plugins.api.Peers`."""
        return self._tunnel(offer, privacy)

    @asynccontextmanager
    async def _tunnel(self, wanted: PeerOffer, privacy: Privacy) -> AsyncGenerator[Tunnel]:
        offer = self._found(wanted)
        address = None if offer is None else self._catalogue.address_of(offer.owner)
        if offer is None or address is None:
            raise Failed(
                f"{wanted.node_name} does not offer {wanted.capability} any more",
                code="unreachable",
            )
        caller = Caller(self._me)
        self._guard.may_send(offer, caller, privacy).enforce()
        header = CallHeader(
            request_id=secrets.token_hex(16),
            name=offer.name.path,
            capability_id=offer.capability_id,
            operation=str(Operation.TUNNEL),
            caller=self._me,
            principal=caller.principal,
            privacy=int(privacy),
            remaining_s=TUNNEL_S,
        )
        with told():
            async with self._streams.call(
                offer.owner, address, header, {}, check=partial(check_departure, privacy)
            ) as call:
                self._open[id(call)] = call
                try:
                    yield PeerTunnel(call)
                finally:
                    del self._open[id(call)]
                    self._note(offer, header, call)

    def _note(self, offer: Offer, header: CallHeader, call: OutgoingCall) -> None:
        self._audit.record(
            "left",
            to=id_text(offer.owner),
            to_name=self._catalogue.name_of(offer.owner),
            capability=offer.capability_id,
            privacy=Privacy(header.privacy).name.lower(),
            caller=str(Caller(self._me)),
            request=header.request_id,
            bytes=call.sent_bytes,
            pieces=1,
            outcome="ended",
        )

    def _is_live(self, offer: Offer) -> bool:
        return offer.owner != self._me and (
            self._catalogue.state_of(offer.owner) is PeerState.ALIVE
        )

    def _found(self, wanted: PeerOffer) -> Offer | None:
        for offer in self._catalogue.offers():
            if (offer.capability_id, id_text(offer.owner)) == (wanted.capability, wanted.node):
                return offer
        return None

    def _shown(self, offer: Offer) -> PeerOffer:
        load = self._catalogue.load_of((offer.owner, offer.capability_id))
        return PeerOffer(
            node=id_text(offer.owner),
            node_name=offer.node_name or self._catalogue.name_of(offer.owner),
            capability=offer.capability_id,
            name=offer.name.path,
            operations=offer.operations,
            slots=offer.slots,
            busy=load.busy if load is not None else None,
            distance=self._catalogue.reach_of(offer.owner),
            round_trip_s=self._catalogue.round_trip_of(offer.owner),
            fields=offer.fields,
        )
