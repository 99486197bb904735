"""Scuttlebutt: what rumours missed is found by a hash, a digest or a gap, and sent.

Invariant: whoever lacks something asks for it with what it holds, so an answer never has a gap before it and
may be lost, doubled or late without harm. Nobody is sent what it did not ask for.

Three things start a repair:

* a gap: a rumour names the version before it; when that is missing here, it is pulled from who told us, after
  a moment in which the gap may close by itself. A ping or ack names its sender's own version, too.
* a hash: pings and acks carry the state hash. When it differs from ours `hash_mismatches` times in a row,
  though ours has been at rest, digests are exchanged with that peer.
* the clock: every `anti_entropy_interval_s`, with a random live peer, whatever the hashes say.

An exchange sends two tables, each cut into ranges of node ids that fit a datagram: a *view* (what we believe
of each node) and a *digest* (what we hold of each record). The peer answers with the claims and deltas that
we lack and asks, in the same way, for what it lacks. What would take more than `sync_datagrams_max` datagrams
goes over the stream. (van Renesse, Dumitriu, Gough, Thomas, "Efficient Reconciliation and Flow Control for
Anti-Entropy Protocols", 2008.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from meshd.core.context import Context, Peer
from meshd.core.dissemination import Rumours
from meshd.core.events import RecordChanged
from meshd.core.membership import Member, Update
from meshd.core.timers import Timer
from meshd.core.wire import (
    Claim,
    Digest,
    Heartbeat,
    Message,
    Pull,
    Record,
    View,
    ViewLine,
    encode,
    payload_bytes,
)
from meshd_cms.types import (
    RUMOUR_BYTES_MAX,
    Applied,
    DigestLine,
    Epoch,
    Known,
    NodeId,
    OwnEpochSeen,
    Parked,
    Rejected,
    Version,
)

FIRST_ID: Final = NodeId(bytes(16))
LAST_ID: Final = NodeId(b"\xff" * 16)
_LINE_BYTES: Final = 46  # of a digest line, the longer of the two kinds, at most
_TABLE_BYTES: Final = 64  # of a digest or view beside its lines, with the envelope
_RECORD_BYTES: Final = 16  # of a record message beside its delta, with the envelope
_UNKNOWN_EPOCH: Final = Epoch(1)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A record known to be longer elsewhere than here."""

    peer: Peer
    epoch: int
    until: int


class Repair:
    """Finds and mends differences with other nodes.

    Args:
        context: shared with the other parts.
        rumours: what a rumour brought is passed on.
        own_epoch_seen: called when our signature was seen under another life of ours.
    """

    def __init__(
        self, context: Context, rumours: Rumours, own_epoch_seen: Callable[[Epoch], None]
    ) -> None:
        self._context = context
        self._rumours = rumours
        self._own_epoch_seen = own_epoch_seen
        self._wanted: dict[NodeId, _Wanted] = {}
        self._pull_timer: Timer | None = None
        self._mismatches = 0
        self._exchanged_s = float("-inf")
        lines = (context.config.datagram_payload_bytes_max - _TABLE_BYTES) // _LINE_BYTES
        assert lines >= 1, "datagram_payload_bytes_max is too small for a digest"
        assert context.config.datagram_payload_bytes_max >= RUMOUR_BYTES_MAX + _RECORD_BYTES
        self._lines_per_table = lines

    def start(self) -> None:
        """Begin the unconditional exchanges."""
        self._later()

    # -- exchanges --------------------------------------------------------------------------------------

    def exchange(self, member: Member) -> None:
        """Compare everything with a peer, unless one was begun a moment ago."""
        context = self._context
        if context.now_s - self._exchanged_s < context.config.exchange_gap_s:
            return
        self._exchanged_s = context.now_s
        self._mismatches = 0
        context.count("exchanges")
        self.send_tables(Peer(member.node, member.address), [])

    def send_tables(self, peer: Peer, first: Sequence[Message]) -> None:
        """Send `first` and our view and digest, asking for what we lack."""
        context = self._context
        tables: list[Message] = [
            *self._views(FIRST_ID, LAST_ID, answer=True),
            *self._digests(FIRST_ID, LAST_ID, answer=True),
        ]
        if peer.node is not None and len(tables) > context.config.sync_datagrams_max:
            whole: list[Message] = [
                View(FIRST_ID, LAST_ID, self._view_lines(FIRST_ID, LAST_ID), answer=True),
                Digest(FIRST_ID, LAST_ID, self._digest_lines(FIRST_ID, LAST_ID), answer=True),
            ]
            context.send_stream(peer, [*first, *whole])
        else:
            context.send(peer, [*first, *tables[: context.config.sync_datagrams_max]])

    def fetch(self, member: Member) -> None:
        """A newcomer: pull its record, if it has one, from itself.

        That is two datagrams a node and newcomer, where rumours of a whole record would be a burst each.
        """
        peer = Peer(member.node, member.address)
        self._want(member.node, _Wanted(peer, member.update.epoch, 1))

    def on_view(self, view: View, peer: Peer) -> None:
        """Send the claims that the peer lacks; ask for those that we lack."""
        theirs = {line.node: line for line in view.lines}
        claims: list[Message] = []
        for update in self._updates(view.low, view.high):
            line = theirs.get(update.node)
            if line is None:
                if update.state.is_live:
                    claims.append(Claim(update, merged=True))
            elif _precedence(line) < update.precedence:
                claims.append(Claim(update, merged=True))
        self._send_bulk(peer, claims)
        if view.answer and any(self._knows_better(line) for line in view.lines):
            self._send_bulk(peer, self._views(view.low, view.high, answer=False))

    def on_digest(self, digest: Digest, peer: Peer) -> None:
        """Send the deltas that the peer lacks; pull those that we lack."""
        outside = [
            line
            for line in self._context.store.digest()
            if not digest.low <= line.owner <= digest.high
        ]
        self._send_deltas(peer, [*digest.lines, *outside])
        if digest.answer:
            wanted = set(self._context.store.wants(digest.lines))
            for line in digest.lines:
                if line.owner in wanted and not self._is_ghost(line.owner, line.epoch):
                    self._want(line.owner, _Wanted(peer, line.epoch, line.max_version))

    def on_pull(self, pull: Pull, peer: Peer) -> None:
        """Send what the peer lacks of exactly these owners."""
        asked = {line.owner for line in pull.lines}
        others = [line for line in self._context.store.digest() if line.owner not in asked]
        self._send_deltas(peer, [*pull.lines, *others])

    # -- records ----------------------------------------------------------------------------------------

    def on_record(self, record: Record, sender: NodeId, peer: Peer) -> None:
        """Hand a delta to the store, and do what its verdict asks for."""
        context, delta = self._context, record.delta
        if self._is_ghost(delta.owner, delta.epoch):
            context.count("record_ghost")
            return
        result = context.store.apply(delta, context.now_s)
        match result:
            case Applied(owner, changed_keys, reset):
                context.touch()
                context.count("records_applied")
                if changed_keys or reset:
                    context.notify(RecordChanged(owner, changed_keys, reset))
                if record.rumour:
                    self._rumours.start(record, sender)
                else:
                    context.count("records_repaired")
            case Known():
                if record.rumour:
                    self._rumours.heard(record, sender)
            case Parked(owner):
                context.count("records_parked")
                self._want(owner, _Wanted(peer, delta.epoch, delta.until))
            case Rejected(_, reason):
                context.count(f"record_rejected_{reason.value}")
            case OwnEpochSeen(epoch):
                self._own_epoch_seen(epoch)
            case _:
                assert_never(result)

    # -- heartbeats -------------------------------------------------------------------------------------

    def on_heartbeat(self, heartbeat: Heartbeat, member: Member) -> None:
        """Compare what a ping or ack says of its sender with what is held here."""
        context = self._context
        line = context.store.line(member.node)
        held = (0, 0) if line is None else (int(line.epoch), int(line.max_version))
        told = (int(member.update.epoch), int(heartbeat.version))
        if held == told:
            context.store.confirm(member.node, context.now_s)
        elif heartbeat.version > 0 and told > held:
            self._want(member.node, _Wanted(Peer(member.node, member.address), *told))
        if heartbeat.state_hash == context.state_hash():
            self._mismatches = 0
        elif context.hash_age_s() >= context.config.hash_settle_s:
            self._mismatches += 1
            if self._mismatches >= context.config.hash_mismatches:
                context.count("hash_repairs")
                self.exchange(member)

    # -- the rest ---------------------------------------------------------------------------------------

    def _later(self) -> None:
        context = self._context
        interval_s = context.config.anti_entropy_interval_s * context.rng.uniform(0.8, 1.2)
        context.timers.at(context.now_s + interval_s, self._anti_entropy)

    def _anti_entropy(self) -> None:
        for member in self._context.members.sample(1):
            self.exchange(member)
        self._later()

    def _is_ghost(self, owner: NodeId, epoch: int) -> bool:
        """Whether it is the record of somebody who is no longer listed."""
        if owner in self._context.members:
            return False
        last = self._context.members.last_word(owner)
        return last is not None and epoch <= last.epoch

    def _knows_better(self, line: ViewLine) -> bool:
        if line.node == self._context.me.node:
            return _precedence(line) > self._context.own_update().precedence
        last = self._context.members.last_word(line.node)
        if last is None:
            return line.state.is_live
        return _precedence(line) > last.precedence

    def _want(self, owner: NodeId, wanted: _Wanted) -> None:
        context = self._context
        before = self._wanted.get(owner)
        if before is None and len(self._wanted) >= context.config.pulls_max:
            context.count("pull_overflow")
            return
        if before is None or (before.epoch, before.until) < (wanted.epoch, wanted.until):
            self._wanted[owner] = wanted
        if self._pull_timer is None:
            due_s = context.now_s + context.config.pull_delay_s * context.rng.uniform(1.0, 2.0)
            self._pull_timer = context.timers.at(due_s, self._pull)

    def _pull(self) -> None:
        context, self._pull_timer = self._context, None
        held = {line.owner: line for line in context.store.digest()}
        by_peer: dict[Peer, list[DigestLine]] = {}
        for owner, wanted in self._wanted.items():
            line = held.get(owner, DigestLine(owner, _UNKNOWN_EPOCH, Version(0), Version(0)))
            if (line.epoch, line.max_version) < (wanted.epoch, wanted.until):
                by_peer.setdefault(wanted.peer, []).append(line)
        self._wanted.clear()
        for peer, lines in by_peer.items():
            context.count("pulls")
            for start in range(0, len(lines), self._lines_per_table):
                context.send(peer, [Pull(tuple(lines[start : start + self._lines_per_table]))])

    def _send_deltas(self, peer: Peer, lines: Sequence[DigestLine]) -> None:
        """In datagrams, if few are enough, otherwise as much as one stream payload holds."""
        context = self._context
        bytes_max = context.config.datagram_payload_bytes_max - _RECORD_BYTES
        theirs = {line.owner: line for line in lines}
        messages: list[Message] = []
        for _ in range(context.config.sync_datagrams_max):
            deltas = context.store.deltas_for(list(theirs.values()), bytes_max)
            if not deltas:
                self._send_bulk(peer, messages)
                return
            for delta in deltas:
                messages.append(Record(delta, rumour=False))
                floor = delta.head.floor
                theirs[delta.owner] = DigestLine(delta.owner, delta.epoch, delta.until, floor)
        if peer.node is None:
            self._send_bulk(peer, messages)
            return
        stream_bytes = context.config.stream_payload_bytes_max - _TABLE_BYTES
        # Each record costs a few bytes beside its delta: leave a sixteenth for that.
        deltas = context.store.deltas_for(lines, stream_bytes - stream_bytes // 16)
        context.send_stream(peer, [Record(delta, rumour=False) for delta in deltas])

    def _send_bulk(self, peer: Peer, messages: Sequence[Message]) -> None:
        if not messages:
            return
        context = self._context
        size = payload_bytes([encode(message) for message in messages])
        datagrams_bytes = (
            context.config.sync_datagrams_max * context.config.datagram_payload_bytes_max
        )
        if size > datagrams_bytes and peer.node is not None:
            context.send_stream(peer, messages)
        else:
            context.send(peer, messages)

    def _updates(self, low: NodeId, high: NodeId) -> list[Update]:
        """What is held of the nodes in a range, ourselves among them, by id."""
        updates = [member.update for member in self._context.members]
        updates.append(self._context.own_update())
        return sorted(
            (update for update in updates if low <= update.node <= high), key=lambda one: one.node
        )

    def _view_lines(self, low: NodeId, high: NodeId) -> tuple[ViewLine, ...]:
        return tuple(
            ViewLine(update.node, update.state, update.epoch, update.incarnation)
            for update in self._updates(low, high)
        )

    def _digest_lines(self, low: NodeId, high: NodeId) -> tuple[DigestLine, ...]:
        return tuple(line for line in self._context.store.digest() if low <= line.owner <= high)

    def _views(self, low: NodeId, high: NodeId, *, answer: bool) -> list[Message]:
        lines = self._view_lines(low, high)
        cuts = _cuts([line.node for line in lines], low, high, self._lines_per_table)
        return [View(*cut[:2], lines[cut[2] : cut[3]], answer) for cut in cuts]

    def _digests(self, low: NodeId, high: NodeId, *, answer: bool) -> list[Message]:
        lines = self._digest_lines(low, high)
        cuts = _cuts([line.owner for line in lines], low, high, self._lines_per_table)
        return [Digest(*cut[:2], lines[cut[2] : cut[3]], answer) for cut in cuts]


def _precedence(line: ViewLine) -> tuple[int, bool, int, int]:
    return Update.order(line.epoch, line.state, line.incarnation)


def _cuts(
    nodes: Sequence[NodeId], low: NodeId, high: NodeId, size: int
) -> list[tuple[NodeId, NodeId, int, int]]:
    """Cut [low, high] into adjoining ranges with at most `size` of the sorted `nodes` in each.

    Returns (low, high, first index, last index + 1) of each range; at least one range, which is empty
    when there are no nodes.
    """
    cuts: list[tuple[NodeId, NodeId, int, int]] = []
    first = low
    for start in range(0, max(1, len(nodes)), size):
        end = min(start + size, len(nodes))
        last = high if end >= len(nodes) else nodes[end - 1]
        cuts.append((first, last, start, end))
        if last != LAST_ID:
            first = NodeId((int.from_bytes(last, "big") + 1).to_bytes(len(last), "big"))
    return cuts
