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
`summaries_equal` and `summaries_different` (received), `answers_excess` (see answers.py),
`pulls`, `pull_overflow`, `records_applied`, `records_repaired`, `records_parked`, `record_ghost`,
`record_rejected_<reason>`, `record_revoked` (of an owner that is out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from meshd.core.answers import Answers
from meshd.core.buckets import FIRST_ID, LAST_ID, Tokens, buckets_for
from meshd.core.context import Context, Peer
from meshd.core.dissemination import Rumours
from meshd.core.effects import Lane
from meshd.core.events import RecordChanged
from meshd.core.membership import Member, Update
from meshd.core.messages import Digest, Heartbeat, Message, Pull, Record, Summary, View, ViewLine
from meshd.core.newcomers import Newcomers, nothing_of, send_pulls
from meshd.core.offences import Offence
from meshd.core.tables import Tables, differing
from meshd.core.timers import Timer
from meshd.core.verifying import Verifying
from meshd.core.wire import encode
from meshd_cms.types import (
    RUMOUR_BYTES_MAX,
    Applied,
    Delta,
    DigestLine,
    Epoch,
    Known,
    NodeId,
    OwnEpochSeen,
    Parked,
    Rejected,
    RejectReason,
)

_ENVELOPE_BYTES: Final = 64  # of a table or records beside their lines, at most
_RECORD_BYTES: Final = 16  # of a record message beside its delta, with the envelope
_STREAMED_OWNERS_MAX: Final = 8  # who asks for more owners' records asks again for what is left
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
_UNCHECKED: Final = (RejectReason.STALE_EPOCH, RejectReason.TOO_MANY_OWNERS)
"""What is refused before any signature is looked at, and happens among honest nodes."""


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
        answers: bounds long answers.
        own_epoch_seen: called when our signature was seen under another life of ours.
    """

    def __init__(
        self,
        context: Context,
        rumours: Rumours,
        answers: Answers,
        own_epoch_seen: Callable[[Epoch], None],
    ) -> None:
        self._context = context
        self._rumours = rumours
        self._own_epoch_seen = own_epoch_seen
        self._wanted: dict[NodeId, _Wanted] = {}
        self._pull_timer: Timer | None = None
        self._doubt: _Doubt | None = None
        self._exchanged_s = float("-inf")
        self._answers = answers
        self._verifying = Verifying(context)
        self._newcomers = Newcomers(context, self.exchange)
        self._tokens = Tokens()
        self._in_vain: dict[
            NodeId, tuple[tuple[int, int], int]
        ] = {}  # (epoch, version), pulls of it
        assert context.config.datagram_payload_bytes_max >= RUMOUR_BYTES_MAX + _RECORD_BYTES

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
        context.send(Peer(member.node, member.address), [Summary(hashes, context.decrees.hash)])

    def send_tables(self, peer: Peer, first: Sequence[Message]) -> None:
        """Send `first` and our view and digest, asking for what we lack."""
        context, held = self._context, Tables(self._context)
        tables: list[Message] = [
            *held.views(FIRST_ID, LAST_ID, answer=True),
            *held.digests(FIRST_ID, LAST_ID, answer=True),
        ]
        context.send(peer, [*first, *tables[: context.config.sync_datagrams_max]])

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
        self._answers.send(peer, tables)

    def fetch(self, member: Member) -> None:
        """A newcomer: have its record, if it has one."""
        self._newcomers.add(member)

    def may_answer(self) -> bool:
        """Whether there is room for long answers."""
        return self._answers.has_room()

    def on_view(self, view: View, peer: Peer) -> None:
        """Send the claims that the peer lacks; ask for those that we lack."""
        theirs, held = {line.node: line for line in view.lines}, Tables(self._context)
        claims: list[bytes] = []
        for update in held.updates(view.low, view.high):
            line = theirs.get(update.node)
            if line is None:
                if update.state.is_live:
                    claims.append(self._answers.claim(update))
            elif _precedence(line) < update.precedence:
                claims.append(self._answers.claim(update))
        self._answers.send_encoded(peer, claims)
        if view.answer and any(self._knows_better(line) for line in view.lines):
            self._answers.send(peer, held.views(view.low, view.high, answer=False))

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

    def on_record(self, record: Record, sender: NodeId, peer: Peer, lane: Lane) -> bool:
        """Hand a delta to the store, and do what its verdict asks for.

        Returns False when its sender is at fault: the rest of what it sent is better left alone.
        """
        context, delta = self._context, record.delta
        if context.decrees.is_revoked(delta.owner):
            context.count("record_revoked")
            return True
        if self._is_ghost(delta.owner, delta.epoch):
            context.count("record_ghost")
            return True
        if self._is_news(delta) and not self._verifying.may_check(delta, sender, lane):
            return True
        result = context.store.apply(delta, context.now_s)
        match result:
            case Applied(owner, changed_keys, reset):
                context.touch()
                context.count("records_applied")
                self._verifying.applied(delta)
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
                self._verifying.waits(sender, lane)
                self._want(owner, _Wanted(peer, delta.epoch, delta.until))
            case Rejected(_, reason):
                context.count(f"record_rejected_{reason.value}")
                if reason not in _UNCHECKED:  # it was checked in vain, whoever's fault that is
                    self._verifying.failed(delta, sender, lane)
                if reason in _SENDERS_FAULT:
                    context.offend(sender, Offence.RECORD_REJECTED)
                    return False
            case OwnEpochSeen(epoch):
                self._own_epoch_seen(epoch)
            case _:
                assert_never(result)
        return True

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
            self._note_announced(member.node, held)
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

    def _note_announced(self, node: NodeId, held: tuple[int, int]) -> None:
        """It tells of more of its own record than is held here; if pulls never bring any, it may not exist."""
        before, pulls = self._in_vain.get(node, (held, 0))
        pulls = pulls + 1 if before == held else 1
        if pulls >= _PULLS_UNFOUNDED:
            self._context.offend(node, Offence.VERSION_UNFOUNDED)
        self._in_vain[node] = (held, pulls)
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

    def _is_news(self, delta: Delta) -> bool:
        """Whether the store will check signatures; most copies of a rumour are known and cost nothing."""
        if delta.owner == self._context.me.node:
            return True
        held = self._context.store.pull_line(delta.owner)
        if held is None or held.epoch != delta.epoch:
            return True
        return delta.until > held.max_version or delta.head.floor > held.floor

    def _is_ghost(self, owner: NodeId, epoch: int) -> bool:
        """Whether it is the record of somebody who is no longer listed."""
        if self._context.decrees.is_revoked(owner):
            return True
        if owner in self._context.members:
            return False
        last = self._context.members.last_word(owner)
        return last is not None and epoch <= last.epoch

    def _knows_better(self, line: ViewLine) -> bool:
        if line.node == self._context.me.node:
            return _precedence(line) > self._context.own_update().precedence
        if self._context.decrees.is_revoked(line.node):
            return False
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
            line = held or nothing_of(owner)
            if (line.epoch, line.max_version) < (wanted.epoch, wanted.until):
                by_peer.setdefault(wanted.peer, []).append(line)
        self._wanted.clear()
        for peer, lines in by_peer.items():
            send_pulls(context, peer, lines)

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
                self._answers.send(peer, messages)
                return
            for delta in deltas:
                messages.append(Record(delta, rumour=False))
                floor = delta.head.floor
                theirs[delta.owner] = DigestLine(delta.owner, delta.epoch, delta.until, floor)
        if len(lines) > _STREAMED_OWNERS_MAX or not self._answers.may_stream(peer):
            self._answers.send(peer, messages)  # who asks for many asks again for what is left
            return
        stream_bytes = context.config.stream_payload_bytes_max - _ENVELOPE_BYTES
        # Each record costs a few bytes beside its delta: leave a sixteenth for that.
        deltas = context.store.deltas_for(lines, stream_bytes - stream_bytes // 16, among)
        records = [encode(Record(delta, rumour=False)) for delta in deltas]
        self._answers.stream(peer, records)


def _precedence(line: ViewLine) -> tuple[int, bool, int, int]:
    return Update.order(line.epoch, line.state, line.incarnation)
