"""Long answers, within a bound: tables and records for who asked, in datagrams or by stream.

Invariants: within any time t we answer with at most `ANSWERS_BURST + t * ANSWERS_PER_S` datagrams, and the same
for each node with its own numbers; a long answer goes where the member that asked says that it is, which a
datagram's source may not be. A question of a few bytes asks for kilobytes, and who has no key at all can
replay one that it recorded: without the bound, to any victim, at any rate.

What is not answered is counted (`answers_excess`) and found again by a later exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from meshd.core.allowance import Allowance, Allowances
from meshd.core.context import Context, Peer
from meshd.core.effects import Lane, Send
from meshd.core.membership import Update
from meshd.core.messages import Claim, Message
from meshd.core.wire import encode, payload_of, payloads_of
from meshd_cms.types import NodeId

ANSWERS_PER_S: Final = 256.0
"""Datagrams of long answers, to all; one by stream counts as `sync_datagrams_max`."""
ANSWERS_BURST: Final = 1024.0
PEER_ANSWERS_PER_S: Final = 16.0
"""The same to one node."""
PEER_ANSWERS_BURST: Final = 64.0


class Answers:
    """Sends long answers."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._all = Allowance(ANSWERS_PER_S, ANSWERS_BURST)
        self._each = Allowances(PEER_ANSWERS_PER_S, PEER_ANSWERS_BURST, context.config.members_max)
        self._claims: dict[NodeId, tuple[Update, bytes]] = {}  # encoded, as many may ask for them

    def has_room(self) -> bool:
        """Whether an answer as long as datagrams may carry is within the bound for all."""
        context = self._context
        return self._all.left(context.now_s) >= context.config.sync_datagrams_max

    def may_stream(self, peer: Peer) -> bool:
        """Whether a stream is worth it: who has just come gets the rest from others."""
        member = None if peer.node is None else self._context.members.get(peer.node)
        settle_s = self._context.config.join_retry_min_s
        return member is not None and self._context.now_s - member.since_s >= settle_s

    def send(self, peer: Peer, messages: Sequence[Message]) -> None:
        """Send messages, of which the last are left out if the bounds ask for it."""
        self.send_encoded(peer, [encode(message) for message in messages])

    def send_encoded(self, peer: Peer, encoded: Sequence[bytes]) -> None:
        """The same, of encoded messages."""
        if not encoded:
            return
        context, config = self._context, self._context.config
        payloads = payloads_of(encoded, config.datagram_payload_bytes_max)
        if len(payloads) > config.sync_datagrams_max and self.may_stream(peer):
            self.stream(peer, encoded)
            return
        del payloads[config.sync_datagrams_max :]
        if self._is_granted(peer, len(payloads)):
            for payload in payloads:
                context.send_payload(self._listed(peer), payload)

    def stream(self, peer: Peer, encoded: Sequence[bytes]) -> None:
        """Send encoded messages as one payload by stream."""
        context, config = self._context, self._context.config
        payload = payload_of(encoded)
        if peer.node is None or len(payload) > config.stream_payload_bytes_max:
            context.count("stream_payload_refused")
        elif self._is_granted(peer, config.sync_datagrams_max):
            context.count("streams_sent")
            to = self._listed(peer).address
            context.emit(Send(to, peer.node, payload, Lane.STREAM))

    def claim(self, update: Update) -> bytes:
        """A claim out of our table, encoded."""
        known = self._claims.get(update.node)
        if known is None or known[0] is not update:
            known = self._claims[update.node] = (update, encode(Claim(update, merged=True)))
            if len(self._claims) > 2 * self._context.config.members_max:
                del self._claims[next(iter(self._claims))]
        return known[1]

    def _is_granted(self, peer: Peer, datagrams: int) -> bool:
        now_s = self._context.now_s
        if self._all.left(now_s) >= datagrams and (
            peer.node is None or self._each.of(peer.node).take(now_s, datagrams)
        ):
            return self._all.take(now_s, datagrams)
        self._context.count("answers_excess")
        return False

    def _listed(self, peer: Peer) -> Peer:
        member = None if peer.node is None else self._context.members.get(peer.node)
        return peer if member is None else Peer(member.node, member.address)
