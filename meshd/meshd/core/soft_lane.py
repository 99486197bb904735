"""The load lane: soft state by the shortest way, never by a version or an incarnation.

Invariants: two sends of one key to one node are at least `soft_gap_s` apart, unless it asked; whoever is told
directly hears of each of our readings every `soft_refresh_s`, so that its age stays below its expiry; a
reading is taken from its owner, or from this node's own stream replies, and nobody passes on another's.

A significant change goes out at once. What did not change is not repeated, only renewed: "the reading of
sequence 7 still holds" is a few bytes, and it rides in the pings and acks that go to a node anyway. A datagram
of its own goes only to a node that no ping or ack has told in the last `soft_refresh_s`. Who hears that a
reading holds which it does not have (a datagram was lost) asks for it.

Every live peer is told directly in meshes of up to `soft_direct_members_max`. In larger ones only those are
that said they are interested, because they route to us; their interest ends after `INTEREST_S`. Everybody
else hears our load when we ping or ack it. (Decision 0015.)

Counted: `soft_published` (sends of a changed value), `soft_renewed` (datagrams of our own that only renew),
`soft_unknown` (renewals of a reading that we lack), `interests_sent`, `interests_answered`,
`interests_ignored` (of strangers, or too soon after the last), `interest_overflow`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, assert_never

from meshd.core.context import Context, Peer
from meshd.core.events import SoftChanged
from meshd.core.membership import Member
from meshd.core.messages import Interest, Message, Soft, SoftStill
from meshd.core.timers import Timer
from meshd_cms.soft import SoftConfig, SoftItem, SoftState
from meshd_cms.types import Epoch, NodeId, Value

RIDING_KEYS = ("load",)
"""The keys that ride in every ping and ack."""

INTEREST_S: Final = 30.0
"""How long an owner tells a node its readings directly after that node said that it is interested."""
INTERESTED_MAX: Final = 256
"""Nodes that are told directly in a large mesh, and owners that we ask to tell us."""

_ASK_AGAIN_S: Final = INTEREST_S / 3  # two repetitions of our interest may be lost
_ASK_GAP_S: Final = 1.0  # least s between questions for a reading that we lack, to one owner
_BATCH_SHARE: Final = 0.125  # of soft_refresh_s: renewals due within it go together, that much late


def is_significant(old: Value, new: Value, change: float) -> bool:
    """Whether a reading is worth sending at once.

    Anything that is not a float counts when it differs; a float when it moved by more than the share
    `change` of the larger of the two.
    """
    if isinstance(old, float) and isinstance(new, float):
        return abs(old - new) > change * max(abs(old), abs(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return old.keys() != new.keys() or any(
            is_significant(old[key], new[key], change) for key in new
        )
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) != len(new) or any(
            is_significant(one, other, change) for one, other in zip(old, new, strict=True)
        )
    return old != new


@dataclass(slots=True)
class _Sent:
    """What others were told of a key; what was published since is not significantly different."""

    item: SoftItem
    at_s: float  # when it was last sent because it had changed
    timer: Timer | None = None  # a change waits for `soft_gap_s` to pass


@dataclass(slots=True)
class _Told:
    """What one node was told of a key."""

    sequence: int
    at_s: float


class SoftLane:
    """Publishes our readings and takes those of others."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.table = SoftState(context.me.node, SoftConfig())
        self._sent: dict[str, _Sent] = {}
        self._told: dict[NodeId, dict[str, _Told]] = {}
        self._interested: dict[NodeId, float] = {}  # who -> until when
        self._answered_s: dict[NodeId, float] = {}  # when an interest was last answered
        self._asked_s: dict[NodeId, float] = {}  # when we last asked an owner
        self._refresh: Timer | None = None

    def start(self) -> None:
        """Begin to drop what is too old."""
        self._expire()

    def publish(self, key: str, value: Value) -> None:
        """A reading of our own; sent now, soon or with the next repetition.

        Raises:
            InvalidKey, ValueTooLarge: nothing was published.
        """
        context, config = self._context, self._context.config
        self.table.publish(key, value, context.store.epoch, context.now_s)
        sent = self._sent.get(key)
        if sent is None:
            self._send(key)
        elif is_significant(sent.item.value, value, config.soft_change):
            due_s = sent.at_s + config.soft_gap_s
            if due_s <= context.now_s:
                self._send(key)
            elif sent.timer is None:
                sent.timer = context.timers.at(due_s, partial(self._send, key))

    def welcome(self, peer: Peer) -> None:
        """A new member: tell it our readings, unless the mesh is too large for that."""
        if self._is_small():
            self._tell(peer, tuple(self._sent), again=True)

    def observe(self, item: SoftItem) -> None:
        """A reading of another node."""
        if self.table.observe(item, self._context.now_s):
            self._context.notify(SoftChanged(item.owner, item.key))

    def on_message(self, message: Soft | SoftStill | Interest, epoch: int, peer: Peer) -> None:
        """A message of this lane, by a node in this epoch."""
        assert peer.node is not None
        context, owner = self._context, peer.node
        match message:
            case Soft(told):
                self.observe(told.by(owner, Epoch(epoch)))
            case SoftStill(sequence, age_s):
                key = self.table.renew(owner, Epoch(epoch), sequence, age_s, context.now_s)
                if key is not None:
                    context.notify(SoftChanged(owner, key))
                else:
                    context.count("soft_unknown")
                    self._ask(owner, 0.0, _ASK_GAP_S)
            case Interest(for_s):
                self._on_interest(for_s, peer)
            case _:
                assert_never(message)

    def riding(self, peer: Peer) -> Sequence[Message]:
        """What rides in a ping or ack to this peer; it counts as told."""
        return self._messages_for(peer.node, RIDING_KEYS, again=True)

    def interested(self, owners: Sequence[NodeId]) -> None:
        """We route to these nodes: in a large mesh, have them tell us directly for a while."""
        if self._is_small():
            return
        for owner in owners[:INTERESTED_MAX]:
            self._ask(owner, INTEREST_S, _ASK_AGAIN_S)

    def forget(self, node: NodeId) -> None:
        """A member is gone, or is another life now."""
        self.table.forget(node)
        for table in (self._told, self._interested, self._answered_s, self._asked_s):
            table.pop(node, None)

    # -- telling ----------------------------------------------------------------------------------------

    def _is_small(self) -> bool:
        members = self._context.members
        return members.live_count() - 1 <= self._context.config.soft_direct_members_max

    def _told_directly(self) -> list[Member]:
        context = self._context
        live = context.members.live()
        if self._is_small():
            return live
        for node in [
            node for node, until_s in self._interested.items() if until_s <= context.now_s
        ]:
            del self._interested[node]
        return [member for member in live if member.node in self._interested]

    def _send(self, key: str) -> None:
        """The value of a key has changed: tell everybody who is told directly."""
        context = self._context
        sent = self._sent.pop(key, None)
        if sent is not None and sent.timer is not None:
            sent.timer.cancel()
        item = self.table.item(context.me.node, key, context.now_s)
        if item is None:  # nobody published it for long: it has expired
            return
        self._sent[key] = _Sent(item, context.now_s)
        for member in self._told_directly():
            self._tell(Peer(member.node, member.address), (key,), again=True)
        context.count("soft_published")
        if self._refresh is None:
            self._schedule(context.now_s + context.config.soft_refresh_s)

    def _tell(self, peer: Peer, keys: Sequence[str], *, again: bool) -> bool:
        messages = self._messages_for(peer.node, keys, again=again)
        if messages:
            self._context.send(peer, messages)
        return bool(messages)

    def _messages_for(
        self, node: NodeId | None, keys: Sequence[str], *, again: bool
    ) -> list[Message]:
        """What a node should hear of these keys now, which it is then taken to have heard.

        Args:
            node: who; somebody unknown is told everything in full.
            keys: of ours.
            again: also what it was told within the last `soft_refresh_s`.
        """
        context, config = self._context, self._context.config
        told = {} if node is None else self._told.setdefault(node, {})
        due_s = context.now_s - config.soft_refresh_s
        messages: list[Message] = []
        for key in keys:
            now = self.table.item(context.me.node, key, context.now_s)
            sent = self._sent.get(key)
            if now is None or sent is None:
                told.pop(key, None)
                continue
            before, sequence = told.get(key), sent.item.sequence
            if before is None or before.sequence != sequence:
                messages.append(Soft(replace(sent.item, age_s=now.age_s).told))
            elif again or before.at_s <= due_s:
                messages.append(SoftStill(sequence, now.age_s))
            else:
                continue
            told[key] = _Told(sequence, context.now_s)
        return messages

    def _renew(self) -> None:
        """Tell those who have not heard of a reading for `soft_refresh_s` that it still holds."""
        context, config = self._context, self._context.config
        self._refresh = None
        for key in [
            key
            for key in self._sent
            if self.table.read(context.me.node, key, context.now_s) is None
        ]:
            del self._sent[key]
        if not self._sent:
            return
        keys = tuple(self._sent)
        next_s = context.now_s + config.soft_refresh_s
        for member in self._told_directly():
            if self._tell(Peer(member.node, member.address), keys, again=False):
                context.count("soft_renewed")
            heard_s = min(one.at_s for one in self._told[member.node].values())
            next_s = min(next_s, heard_s + config.soft_refresh_s)
        self._schedule(next_s)

    def _schedule(self, due_s: float) -> None:
        """Renew a little after the first is due, together with those that are due by then."""
        late_s = self._context.config.soft_refresh_s * _BATCH_SHARE
        self._refresh = self._context.timers.at(due_s + late_s, self._renew)

    # -- interest ---------------------------------------------------------------------------------------

    def _ask(self, owner: NodeId, for_s: float, gap_s: float) -> None:
        """Ask an owner for its readings, unless it was asked within the last `gap_s`."""
        context = self._context
        member = context.members.get(owner)
        if member is None or not member.is_live:
            return
        asked_s = self._asked_s.pop(owner, float("-inf"))
        if context.now_s - asked_s < gap_s:
            self._asked_s[owner] = asked_s
            return
        self._asked_s[owner] = context.now_s
        if len(self._asked_s) > context.config.members_max:
            del self._asked_s[next(iter(self._asked_s))]
        context.count("interests_sent")
        context.send(Peer(owner, member.address), [Interest(for_s)])

    def _on_interest(self, for_s: float, peer: Peer) -> None:
        context, node = self._context, peer.node
        assert node is not None
        member = context.members.get(node)
        answered_s = self._answered_s.get(node, float("-inf"))
        too_soon = context.now_s - answered_s < context.config.soft_gap_s
        if member is None or not member.is_live or too_soon:
            context.count("interests_ignored")
            return
        self._answered_s[node] = context.now_s
        until_s = context.now_s + min(for_s, INTEREST_S)
        if until_s > max(context.now_s, self._interested.get(node, 0.0)):
            if len(self._interested) < INTERESTED_MAX or node in self._interested:
                self._interested[node] = until_s
            else:
                context.count("interest_overflow")
        context.count("interests_answered")
        self._told.pop(node, None)  # it lacks something, or knows us too little to say: in full
        self._tell(Peer(node, member.address), tuple(self._sent), again=True)

    def _expire(self) -> None:
        context = self._context
        self.table.expire(context.now_s)
        context.timers.at(context.now_s + 1.0, self._expire)
