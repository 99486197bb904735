"""Who is at the other end of a connection: its handshake, and what is not to be sent to it."""

from __future__ import annotations

import ssl

import trio

from meshd.shell.gate import TRUST_ID, is_internal
from meshd.shell.stream_connection import Connection
from meshd.shell.stream_errors import PeerRejected, PeerUnreachable
from meshd.trust.certificates import CertificateError, Role
from meshd.trust.identity import Identity
from meshd.trust.tls import PeerProof, peer_proof
from meshd_cms.types import NodeId, node_id_short


async def secure(
    stream: trio.SocketStream,
    identity: Identity,
    expected: NodeId | None,
    deadline_s: float,
    *,
    dialed: bool,
) -> tuple[trio.SSLStream[trio.SocketStream], PeerProof]:
    """TLS over a connection, and who is at the other end.

    Raises:
        PeerUnreachable: it is nobody of the mesh, or not who was expected; the stream is then closed.
    """
    context = identity.client_context if dialed else identity.server_context
    # "https_compatible" means: do not wait for the peer's goodbye when closing. Frames have lengths
    # and calls have final frames, so a cut can never pass for an end.
    secured = trio.SSLStream(stream, context, server_side=not dialed, https_compatible=True)
    try:
        with trio.fail_after(deadline_s):
            return secured, await _authenticated(secured, identity, expected)
    except trio.TooSlowError as error:
        await trio.aclose_forcefully(stream)
        raise PeerUnreachable("the TLS handshake did not end in time") from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def _authenticated(
    secured: trio.SSLStream[trio.SocketStream], identity: Identity, expected: NodeId | None
) -> PeerProof:
    """Who is at the other end, by its certificate. Raises PeerUnreachable."""
    try:
        await secured.do_handshake()
        proof = peer_proof(secured, identity.root)
    except trio.BrokenResourceError as error:
        cause = error.__cause__ or error
        if isinstance(cause, ssl.SSLError):
            raise PeerRejected(f"TLS: {cause}", code="bad_certificate") from error
        raise PeerUnreachable(f"the TLS handshake broke: {cause}") from error
    except CertificateError as error:
        raise PeerRejected(str(error), code="bad_certificate") from error
    peer = proof.credential.node
    if peer == identity.node_id:
        raise PeerRejected("that is this node itself", code="own")
    if expected is not None and peer != expected:
        wanted, found = node_id_short(expected), node_id_short(peer)
        raise PeerRejected(f"node {found} is there, not {wanted}", code="other_node")
    return proof


def check_callee(connection: Connection, capability_id: str) -> None:
    """Raise PeerRejected for a peer that such a call is not sent to."""
    if not connection.verdict.is_good and capability_id != TRUST_ID:
        raise out_of_standing(connection)
    is_observer = connection.proof.credential.role is Role.OBSERVER
    if is_observer and not is_internal(capability_id):
        name = node_id_short(connection.peer)
        raise PeerRejected(f"node {name} is an observer and serves nothing", code="observer")


def out_of_standing(connection: Connection) -> PeerRejected:
    """Why nothing but a renewal passes on a connection."""
    return PeerRejected(connection.verdict.message, code=connection.verdict.code)


def never_up(connection: Connection) -> PeerUnreachable:
    """Why a dialed connection ended before HELLO, as an error for who waits."""
    if connection.fault is not None:
        return PeerRejected(connection.fault.message, code=connection.fault.code)
    if not connection.verdict.is_good:
        return out_of_standing(connection)
    reason = connection.lost or "closed"
    if connection.is_tls_fault:
        return PeerRejected(reason, code="bad_certificate")
    return PeerUnreachable(f"{reason}, before it said who it is: does it belong to this mesh?")
