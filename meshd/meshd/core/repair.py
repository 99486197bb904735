"""Scuttlebutt: what rumours missed is found by a hash, a digest or a gap, and sent.

Invariant: whoever lacks something asks for it with what it holds, so an answer never has a gap before it and
may be lost, doubled or late without harm. Nobody is sent what it did not ask for.

Three things start a repair:

* a gap: a rumour names the version before it; when that is missing here, it is pulled from who told us, after
  a moment in which the gap may close by itself. A ping or ack names its sender's own version, too.
* a hash: pings and acks carry the state hash. When it differs from ours, though ours has been at rest for
  `hash_settle_s`, and ours is still the same a moment later, we begin an exchange with that peer. In that
  moment a rumour that is under way arrives, so a mesh in which all is well begins no exchanges; and a
  rumour that was missed is mended after one heartbeat.
* the clock: every `anti_entropy_interval_s`, with a random live peer, whatever the hashes say.

An exchange begins with a *summary*: hashes of what is held, a bucket of node ids each (buckets.py). Where
its own differ, the peer answers with two tables: a *view* (what it believes of each node) and a *digest* (what
it holds of each record). We send the claims and deltas that it lacks, and ask for those that we lack. So
equal nodes spend one datagram, and nodes that differ in one place about two each way, in a mesh of any
size. Who joins has next to nothing, and sends its tables at once. What would take more than
`sync_datagrams_max` datagrams goes over the stream. (van Renesse, Dumitriu, Gough, Thomas, "Efficient
Reconciliation and Flow Control for Anti-Entropy Protocols", 2008; decision 0014.)

Counted: `hash_mismatches` (heartbeats that differ from ours at rest), `hash_repairs` (those confirmed, and an
exchange begun), `hash_mismatches_passed` (those that news explained), `exchanges` (begun, for any reason),
`summaries_equal` and `summaries_different` (received), `answers_excess` (not sent, being over the bound),
`pulls`, `pull_overflow`, `records_applied`, `records_repaired`, `records_parked`, `record_ghost`,
`record_rejected_<reason>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from meshd.core.allowance import Allowance, Allowances
from meshd.core.buckets import FIRST_ID, LAST_ID, Tokens, buckets_for
from meshd.core.context import Context, Peer
from meshd.core.dissemination import Rumours
from meshd.core.events import RecordChanged
from meshd.core.membership import Member, Update
from meshd.core.offences import Offence
from meshd.core.tables import Tables, differing, lines_per_table
from meshd.core.timers import Timer
from meshd.core.wire import (
    Claim,
    Digest,
    Heartbeat,
    Message,
    Pull,
    Record,
    Summary,
    View,
    ViewLine,
    encode,
    payload_bytes,
    payloads_of,
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
    RejectReason,
    Version,
)

_ENVELOPE_BYTES: Final = 64  # of a table or records beside their lines, at most
_RECORD_BYTES: Final = 16  # of a record message beside its delta, with the envelope
_UNKNOWN_EPOCH: Final = Epoch(1)
ANSWERS_PER_S: Final = 256.0
"""Datagrams with tables and records that we answer with, to all; a stream counts as an answer's most."""
ANSWERS_BURST: Final = 1024.0
PEER_ANSWERS_PER_S: Final = 16.0
"""The same to one node. A few bytes ask for kilobytes, and can be replayed by who has no key."""
PEER_ANSWERS_BURST: Final = 64.0
_CONFIRM_SHARE: Final = 0.375  # of hash_settle_s: what a rumour under way may still take, and more
_PULLS_UNFOUNDED: Final = 8  # of one announced version in vain: more than loss explains
_SENDERS_FAULT: Final = (
    RejectReason.MALFORMED,
    RejectReason.BAD_KEY,
    RejectReason.BAD_HEAD_SIGNATURE,
    RejectReason.BAD_ENTRY_SIGNATURE,
    RejectReason.TOO_MANY_ENTRIES,
)
"""What no honest node passes on: it has checked the same before it took the record."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A record known to be longer elsewhere than here."""

    peer: Peer
    epoch: int
    until: int


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A heartbeat that differed, and that is looked at again in a moment."""

    node: NodeId
    state_hash: bytes  # ours
    timer: Timer


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
        self._doubt: _Doubt | None = None
        self._exchanged_s = float("-inf")
        self._answers = Allowance(ANSWERS_PER_S, ANSWERS_BURST)
        self._answers_to = Allowances(
            PEER_ANSWERS_PER_S, PEER_ANSWERS_BURST, context.config.members_max
        )
        self._tokens = Tokens()
        self._in_vain: dict[
            NodeId, tuple[tuple[int, int], int]
        ] = {}  # (epoch, version), pulls of it
        lines = lines_per_table(context.config.datagram_payload_bytes_max)
        assert lines >= 1, "datagram_payload_bytes_max is too small for a digest"
        assert context.config.datagram_payload_bytes_max >= RUMOUR_BYTES_MAX + _RECORD_BYTES
        self._lines_per_table = lines

    def start(self) -> None:
        """Begin the unconditional exchanges."""
        self._later()

    # -- exchanges --------------------------------------------------------------------------------------

    def exchange(self, member: Member) -> None:
        """Compare everything with a peer, unless that was begun with somebody a moment ago."""
        context = self._context
        if self._gap_left_s() > 0:
            return
        self._exchanged_s = context.now_s
        context.count("exchanges")
        buckets = buckets_for(context.members.live_count())
        hashes = Tables(context).summary(self._tokens, buckets)
        context.send(Peer(member.node, member.address), [Summary(hashes)])

    def send_tables(self, peer: Peer, first: Sequence[Message]) -> None:
        """Send `first` and our view and digest, asking for what we lack."""
        context, held = self._context, Tables(self._context)
        tables: list[Message] = [
            *held.views(FIRST_ID, LAST_ID, answer=True),
            *held.digests(FIRST_ID, LAST_ID, answer=True),
        ]
        context.send(peer, [*first, *tables[: context.config.sync_datagrams_max]])

    def may_answer(self) -> bool:
        """Whether an answer as long as datagrams may carry is within our bound."""
        context = self._context
        return self._answers.left(context.now_s) >= context.config.sync_datagrams_max

    def on_summary(self, summary: Summary, peer: Peer) -> None:
        """Tell the peer what we hold of the buckets that differ."""
        context, held = self._context, Tables(self._context)
        ours = held.summary(self._tokens, len(summary.hashes))
        ranges = differing(ours, summary.hashes)
        context.count("summaries_different" if ranges else "summaries_equal")
        tables: list[Message] = []
        for low, high in ranges:
            tables += held.views(low, high, answer=True)
            tables += held.digests(low, high, answer=True)
        self._send_bulk(peer, tables)

    def fetch(self, member: Member) -> None:
        """A newcomer: pull its record, if it has one, from itself.

        That is two datagrams a node and newcomer, where rumours of a whole record would be a burst each.
        When many come at once, who they are is spread first, and their records follow.
        """
        peer = Peer(member.node, member.address)
        self._want(member.node, _Wanted(peer, member.update.epoch, 1))

    def on_view(self, view: View, peer: Peer) -> None:
        """Send the claims that the peer lacks; ask for those that we lack."""
        theirs, held = {line.node: line for line in view.lines}, Tables(self._context)
        claims: list[Message] = []
        for update in held.updates(view.low, view.high):
            line = theirs.get(update.node)
            if line is None:
                if update.state.is_live:
                    claims.append(Claim(update, merged=True))
            elif _precedence(line) < update.precedence:
                claims.append(Claim(update, merged=True))
        self._send_bulk(peer, claims)
        if view.answer and any(self._knows_better(line) for line in view.lines):
            self._send_bulk(peer, held.views(view.low, view.high, answer=False))

    def on_digest(self, digest: Digest, peer: Peer) -> None:
        """Send the deltas that the peer lacks; pull those that we lack."""
        held = Tables(self._context).digest_lines(digest.low, digest.high)
        self._send_deltas(peer, digest.lines, [line.owner for line in held])
        if digest.answer:
            wanted = set(self._context.store.wants(digest.lines))
            for line in digest.lines:
                if line.owner in wanted and not self._is_ghost(line.owner, line.epoch):
                    self._want(line.owner, _Wanted(peer, line.epoch, line.max_version))

    def on_pull(self, pull: Pull, peer: Peer) -> None:
        """Send what the peer lacks of exactly these owners."""
        self._send_deltas(peer, pull.lines, [line.owner for line in pull.lines])

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
                if reason in _SENDERS_FAULT:
                    context.offend(sender, Offence.RECORD_REJECTED)
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
            self._in_vain.pop(member.node, None)
        elif heartbeat.version > 0 and told > held:
            self._note_announced(member.node, told)
            self._want(member.node, _Wanted(Peer(member.node, member.address), *told))
        ours = context.state_hash()
        if heartbeat.state_hash in (None, ours):
            if self._doubt is not None and self._doubt.node == member.node:
                self._end_doubt()
        elif context.hash_age_s() >= context.config.hash_settle_s:
            context.count("hash_mismatches")
            if self._doubt is None:
                most_s = _CONFIRM_SHARE * context.config.hash_settle_s
                due_s = context.now_s + most_s * context.rng.uniform(0.75, 1.0)
                timer = context.timers.at(due_s, self._confirm)
                self._doubt = _Doubt(member.node, ours, timer)

    def _confirm(self) -> None:
        """The moment is over: if no news has come, something was missed."""
        context, doubt = self._context, self._doubt
        assert doubt is not None
        left_s = self._gap_left_s()
        if left_s > 0:
            timer = context.timers.at(context.now_s + left_s, self._confirm)
            self._doubt = _Doubt(doubt.node, doubt.state_hash, timer)
            return
        self._doubt = None
        member = context.members.get(doubt.node)
        if context.state_hash() != doubt.state_hash:
            context.count("hash_mismatches_passed")
        elif member is not None and member.is_live:
            context.count("hash_repairs")
            self.exchange(member)

    def _end_doubt(self) -> None:
        assert self._doubt is not None
        self._doubt.timer.cancel()
        self._doubt = None

    def _gap_left_s(self) -> float:
        """How long until an exchange may begin."""
        context = self._context
        return self._exchanged_s + context.config.exchange_gap_s - context.now_s

    def _note_announced(self, node: NodeId, told: tuple[int, int]) -> None:
        """A version of its own record that we lack; told again and again, it may not exist."""
        before, pulls = self._in_vain.get(node, (told, 0))
        pulls = pulls + 1 if before == told else 1
        if pulls >= _PULLS_UNFOUNDED:
            self._context.offend(node, Offence.VERSION_UNFOUNDED)
        self._in_vain[node] = (told, pulls)
        if len(self._in_vain) > self._context.config.members_max:
            del self._in_vain[next(iter(self._in_vain))]

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
        by_peer: dict[Peer, list[DigestLine]] = {}
        for owner, wanted in self._wanted.items():
            held = context.store.pull_line(owner)
            line = held or DigestLine(owner, _UNKNOWN_EPOCH, Version(0), Version(0))
            if (line.epoch, line.max_version) < (wanted.epoch, wanted.until):
                by_peer.setdefault(wanted.peer, []).append(line)
        self._wanted.clear()
        for peer, lines in by_peer.items():
            context.count("pulls")
            for start in range(0, len(lines), self._lines_per_table):
                context.send(peer, [Pull(tuple(lines[start : start + self._lines_per_table]))])

    def _send_deltas(
        self, peer: Peer, lines: Sequence[DigestLine], among: Sequence[NodeId]
    ) -> None:
        """In datagrams, if few are enough, otherwise as much as one stream payload holds."""
        context = self._context
        bytes_max = context.config.datagram_payload_bytes_max - _RECORD_BYTES
        theirs = {line.owner: line for line in lines}
        messages: list[Message] = []
        for _ in range(context.config.sync_datagrams_max):
            deltas = context.store.deltas_for(tuple(theirs.values()), bytes_max, among)
            if not deltas:
                self._send_bulk(peer, messages)
                return
            for delta in deltas:
                messages.append(Record(delta, rumour=False))
                floor = delta.head.floor
                theirs[delta.owner] = DigestLine(delta.owner, delta.epoch, delta.until, floor)
        if not self._may_stream(peer):
            self._send_bulk(peer, messages)
            return
        stream_bytes = context.config.stream_payload_bytes_max - _ENVELOPE_BYTES
        # Each record costs a few bytes beside its delta: leave a sixteenth for that.
        deltas = context.store.deltas_for(lines, stream_bytes - stream_bytes // 16, among)
        if self._is_granted(peer, context.config.sync_datagrams_max):
            whole = [Record(delta, rumour=False) for delta in deltas]
            context.send_stream(self._proven(peer), whole)

    def _send_bulk(self, peer: Peer, messages: Sequence[Message]) -> None:
        """An answer, within what we do for one node and for all; what does not fit is not sent."""
        if not messages:
            return
        context, config = self._context, self._context.config
        size = payload_bytes([encode(message) for message in messages])
        datagrams = math.ceil(size / config.datagram_payload_bytes_max)
        if datagrams > config.sync_datagrams_max and self._may_stream(peer):
            if self._is_granted(peer, config.sync_datagrams_max):
                context.send_stream(self._proven(peer), messages)
        elif self._is_granted(peer, min(datagrams, config.sync_datagrams_max)):
            encoded = [encode(message) for message in messages]
            payloads = payloads_of(encoded, config.datagram_payload_bytes_max)
            for payload in payloads[: config.sync_datagrams_max]:
                context.send_payload(self._proven(peer), payload)

    def _is_granted(self, peer: Peer, datagrams: int) -> bool:
        """Whether so many datagrams may be answered; if not, counted, and left to a later exchange."""
        now_s = self._context.now_s
        one = None if peer.node is None else self._answers_to.of(peer.node)
        if self._answers.left(now_s) < datagrams or not (one is None or one.take(now_s, datagrams)):
            self._context.count("answers_excess")
            return False
        return self._answers.take(now_s, datagrams)

    def _may_stream(self, peer: Peer) -> bool:
        """Who is a member for some time may be sent much; who joins gets the rest from others."""
        member = None if peer.node is None else self._context.members.get(peer.node)
        settle_s = self._context.config.join_retry_min_s
        return member is not None and self._context.now_s - member.since_s >= settle_s

    def _proven(self, peer: Peer) -> Peer:
        """Long answers go to where a member said that it is: a datagram's source may be made up."""
        member = None if peer.node is None else self._context.members.get(peer.node)
        return peer if member is None else Peer(member.node, member.address)


def _precedence(line: ViewLine) -> tuple[int, bool, int, int]:
    return Update.order(line.epoch, line.state, line.incarnation)
