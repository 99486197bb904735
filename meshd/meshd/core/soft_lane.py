"""The load lane: soft state by the shortest way, never by a version or an incarnation.

A significant change goes out at once, but two sends of one key are at least `soft_gap_s` apart; what did not
change is repeated every `soft_refresh_s`, so that its age stays below its expiry. Every live peer is told
directly in meshes of up to `soft_direct_members_max`; in larger ones a few random peers, and everybody hears
it in pings and acks. A reading is taken from its owner, or from this node's own stream replies; nobody
passes on another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from meshd.core.context import Context, Peer
from meshd.core.events import SoftChanged
from meshd.core.timers import Timer
from meshd.core.wire import Message, Soft
from meshd_cms.soft import SoftConfig, SoftItem, SoftState
from meshd_cms.types import NodeId, Value

RIDING_KEYS = ("load",)
"""The keys that ride in every ping and ack."""


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
    value: Value
    at_s: float
    timer: Timer


class SoftLane:
    """Publishes our readings and takes those of others."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.table = SoftState(context.me.node, SoftConfig())
        self._sent: dict[str, _Sent] = {}

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
        elif is_significant(sent.value, value, config.soft_change):
            due_s = sent.at_s + config.soft_gap_s
            if due_s <= context.now_s:
                self._send(key)
            elif sent.timer.due_s > due_s:
                sent.timer.cancel()
                sent.timer = context.timers.at(due_s, partial(self._send, key))

    def welcome(self, peer: Peer) -> None:
        """A new member: tell it our readings."""
        items = self.table.items(self._context.me.node, self._context.now_s)
        if items:
            self._context.send(peer, [Soft(item) for item in items])

    def observe(self, item: SoftItem) -> None:
        """A reading of another node."""
        if self.table.observe(item, self._context.now_s):
            self._context.notify(SoftChanged(item.owner, item.key))

    def riding(self) -> Sequence[Message]:
        """What rides in a ping or ack."""
        items = (
            self.table.item(self._context.me.node, key, self._context.now_s) for key in RIDING_KEYS
        )
        return [Soft(item) for item in items if item is not None]

    def forget(self, node: NodeId) -> None:
        """A member is gone, or is another life now."""
        self.table.forget(node)

    def _send(self, key: str) -> None:
        context, config = self._context, self._context.config
        before = self._sent.get(key)
        if before is not None:
            before.timer.cancel()
        item = self.table.item(context.me.node, key, context.now_s)
        if item is None:  # nobody published it for long: it has expired
            self._sent.pop(key, None)
            return
        live = context.members.live()
        if len(live) <= config.soft_direct_members_max:
            told = live
        else:
            told = context.members.sample(config.soft_fanout)
        for member in told:
            context.send(Peer(member.node, member.address), [Soft(item)])
        context.count("soft_published")
        timer = context.timers.at(context.now_s + config.soft_refresh_s, partial(self._send, key))
        self._sent[key] = _Sent(item.value, context.now_s, timer)

    def _expire(self) -> None:
        context = self._context
        self.table.expire(context.now_s)
        context.timers.at(context.now_s + 1.0, self._expire)
