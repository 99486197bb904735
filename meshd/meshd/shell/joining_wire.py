"""Messages of the join channel over a TLS stream, either way, and nothing that is longer than allowed."""

from __future__ import annotations

import ssl
from typing import TypeAlias

import trio

from meshd.trust.join_errors import JoinBroken
from meshd.trust.join_messages import (
    LENGTH_BYTES,
    MESSAGE_BYTES_MAX,
    FromInviter,
    FromJoiner,
    body_length,
    encode_message,
)

Secured: TypeAlias = "trio.SSLStream[trio.SocketStream]"


def secured(
    stream: trio.SocketStream, context: ssl.SSLContext, *, server_side: bool
) -> trio.SSLStream[trio.SocketStream]:
    """TLS over a stream; messages have lengths, so a cut never passes for an end."""
    return trio.SSLStream(stream, context, server_side=server_side, https_compatible=True)


async def send_message(stream: Secured, message: FromJoiner | FromInviter) -> None:
    """Send a message.

    Raises:
        JoinBroken: the connection is gone.
    """
    try:
        await stream.send_all(encode_message(message))
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise broken(error) from error


async def receive_body(stream: Secured, bytes_max: int = MESSAGE_BYTES_MAX) -> bytes:
    """The bytes of the next message, for a decoder.

    Raises:
        MalformedMessage: it is longer than `bytes_max`.
        JoinBroken: the connection ended.
    """
    header = await _exactly(stream, LENGTH_BYTES)
    return await _exactly(stream, body_length(header, bytes_max))


async def _exactly(stream: Secured, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        try:
            some = await stream.receive_some(count - len(received))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise broken(error) from error
        if not some:
            raise JoinBroken("the other side closed the connection in the middle of the exchange")
        received += some
    return bytes(received)


def broken(error: BaseException) -> JoinBroken:
    """What a connection that broke is to us."""
    return JoinBroken(f"the connection broke: {error.__cause__ or error}")
