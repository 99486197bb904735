"""Rumours: news sent in a burst that infects the mesh in a few tens of milliseconds.

Invariants: there is one rumour a subject, the newest; a rumour is sent at most L times by this node,

    L = ceil((ln N + 7) / (1 - p)), and never more than rumour_sends_per_peer_max * (N - 1);

it is not sent to who is known to have it; what does not fit a datagram waits for the next.

A new rumour goes to `rumour_fanout` peers at once and to as many more after 10, 20, 40 ms and so on (the gap
doubles), walking a shuffled list of the peers, so that nobody is told twice before everybody was told
once. Every ping and ack also takes what fits, least-sent first, then newest. With those L a rumour misses
some node with a probability of about e**-7; the state hash finds what it missed (repair.py). The first
sends are made when the driver next fires timers, not in the call that starts the rumour: writes made
together travel together.

Counted: `rumours_started`, `rumours_sent` (copies), `rumour_too_large` (repair carries it), `rumour_overflow`
(the oldest of all made room), `rumour_overflow_owner` (the oldest of an owner that writes much).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from meshd.core.context import Context, Peer
from meshd.core.decrees import decree_id
from meshd.core.messages import Claim, Message, Proclaim, Record
from meshd.core.timers import Timer
from meshd.core.wire import encode, payload_bytes, payload_of
from meshd_cms.types import NODE_ID_BYTES, NodeId

Subject: TypeAlias = tuple[str, NodeId, int]
"""("member", node, 0), ("record", owner, version) or ("decree", nobody, its id)."""


News: TypeAlias = Claim | Record | Proclaim
"""What is spread as a rumour."""

NOBODY: Final = NodeId(bytes(NODE_ID_BYTES))
_OF_ONE_OWNER_MAX: Final = 32  # records of one owner that wait to be told


@dataclass(slots=True)
class _Rumour:
    message: News
    encoded: bytes
    created: int  # our count of rumours: higher is newer
    due_s: float  # of the next burst step
    gap_s: float  # from that step to the one after
    sends: int = 0
    holders: set[NodeId] = field(default_factory=set[NodeId])  # only asked, never iterated


def sends_for(nodes: int, loss: float, per_peer_max: int) -> int:
    """L: how often one node sends one rumour in a mesh of this size."""
    wanted = math.ceil((math.log(max(1, nodes)) + 7) / (1 - loss))
    return min(wanted, per_peer_max * (nodes - 1))


def _subject(message: News) -> Subject:
    match message:
        case Claim(update):
            return ("member", update.node, 0)
        case Record(delta):
            return ("record", delta.owner, delta.until)
        case Proclaim(raw):
            return ("decree", NOBODY, int.from_bytes(decree_id(raw), "big"))


class Rumours:
    """What this node has to tell, and to whom next."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._rumours: dict[Subject, _Rumour] = {}
        self._ring: list[NodeId] = []
        self._created = 0
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._rumours)

    def start(self, message: News, heard_from: NodeId | None = None) -> None:
        """Spread a message; it replaces an older rumour about the same subject."""
        context, config = self._context, self._context.config
        encoded = encode(message)
        subject = _subject(message)
        self._rumours.pop(subject, None)
        if payload_bytes([encoded]) > config.datagram_payload_bytes_max:
            context.count("rumour_too_large")
            return
        if self._sends() <= 0:
            return  # nobody is there; whoever comes will ask
        self._make_room(subject)
        self._created += 1
        rumour = _Rumour(message, encoded, self._created, context.now_s, config.rumour_step_s)
        rumour.holders.update(_knowing(message))
        if heard_from is not None:
            rumour.holders.add(heard_from)
        self._rumours[subject] = rumour
        context.count("rumours_started")
        self._schedule()

    def _make_room(self, subject: Subject) -> None:
        """Drop the oldest when there are too many; who writes much pushes out its own news first."""
        context = self._context
        if len(self._rumours) >= _OF_ONE_OWNER_MAX:
            kind, owner, _ = subject
            same = [one for one in self._rumours if one[0] == kind and one[1] == owner]
            if len(same) >= _OF_ONE_OWNER_MAX:
                del self._rumours[same[0]]
                context.count("rumour_overflow_owner")
        if len(self._rumours) >= context.config.rumours_max:
            del self._rumours[next(iter(self._rumours))]
            context.count("rumour_overflow")

    def heard(self, message: News, sender: NodeId) -> None:
        """A peer told us the same: it need not be told."""
        rumour = self._rumours.get(_subject(message))
        if rumour is None or sender in rumour.holders:
            return
        if rumour.message == message:
            rumour.holders.add(sender)

    def send(self, peer: Peer, messages: list[Message]) -> None:
        """Send one datagram of these messages and as many rumours as fit."""
        encoded = [encode(message) for message in messages]
        if payload_bytes(encoded) > self._context.config.datagram_payload_bytes_max:
            self._context.send(peer, messages)
            return
        if peer.node is not None:
            self._fill(encoded, peer.node, self._rumours)
        self._context.send_payload(peer, payload_of(encoded))

    def _fill(self, encoded: list[bytes], node: NodeId, rumours: dict[Subject, _Rumour]) -> None:
        context = self._context
        room, sends = (
            context.config.datagram_payload_bytes_max - payload_bytes(encoded),
            self._sends(),
        )
        order = sorted(rumours.items(), key=lambda item: (item[1].sends, -item[1].created))
        for subject, rumour in order:
            if node in rumour.holders or len(rumour.encoded) > room:
                continue
            encoded.append(rumour.encoded)
            room -= len(rumour.encoded)
            rumour.sends += 1
            context.count("rumours_sent")
            if rumour.sends >= sends:
                del self._rumours[subject]

    def _sends(self) -> int:
        """L for the mesh as it is now: while many join at once, it grows under the rumours about them."""
        config = self._context.config
        return sends_for(
            self._context.members.live_count(),
            config.rumour_loss,
            config.rumour_sends_per_peer_max,
        )

    def _burst(self) -> None:
        """Send what is due to the next few peers, and fill up with what is not."""
        context = self._context
        self._timer = None
        # Steps that fall together but for rounding go together.
        until_s = context.now_s + context.config.rumour_step_s / 4
        due = {subject: one for subject, one in self._rumours.items() if one.due_s <= until_s}
        for node in self._next_peers(due):
            member = context.members.get(node)
            assert member is not None
            encoded: list[bytes] = []
            still_due = {subject: one for subject, one in due.items() if subject in self._rumours}
            self._fill(encoded, node, still_due)
            rest = {key: one for key, one in self._rumours.items() if key not in due}
            self._fill(encoded, node, rest)
            if encoded:
                context.send_payload(Peer(node, member.address), payload_of(encoded))
        for rumour in due.values():
            rumour.due_s = context.now_s + rumour.gap_s
            rumour.gap_s *= 2
        self._schedule()

    def _next_peers(self, due: dict[Subject, _Rumour]) -> list[NodeId]:
        """The next few of the ring to whom something due is news; drops what is news to nobody."""
        live = [member.node for member in self._context.members.live()]
        for subject in [key for key, one in due.items() if all(n in one.holders for n in live)]:
            del due[subject]
            del self._rumours[subject]
        peers: list[NodeId] = []
        passed: list[NodeId] = []
        for _ in range(2 * len(live)):
            if len(peers) >= min(self._context.config.rumour_fanout, len(live)):
                break
            if not self._ring:
                self._ring = sorted(live)
                self._context.rng.shuffle(self._ring)
            node = self._ring.pop()
            member = self._context.members.get(node)
            if member is None or not member.is_live or node in peers:
                continue
            if any(node not in rumour.holders for rumour in due.values()):
                peers.append(node)
            elif node not in passed:
                passed.append(node)
        self._ring.extend(passed)  # they keep their turn for the next news
        return peers

    def _schedule(self) -> None:
        due_s = min((rumour.due_s for rumour in self._rumours.values()), default=None)
        if self._timer is not None:
            if due_s is not None and self._timer.due_s == due_s:
                return
            self._timer.cancel()
            self._timer = None
        if due_s is not None:
            self._timer = self._context.timers.at(due_s, self._burst)


def _knowing(message: News) -> tuple[NodeId, ...]:
    """Who need not be told: the subject, who is asked by its accusers, and the accuser."""
    match message:
        case Claim(update):
            return (update.node, update.accuser)
        case Record(delta):
            return (delta.owner,)
        case Proclaim():
            return ()
