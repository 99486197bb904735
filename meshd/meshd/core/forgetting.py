"""What is forgotten: members that are gone for long, and records of nobody."""

from __future__ import annotations

from meshd.core.context import Context
from meshd.core.events import MemberForgotten, RecordChanged
from meshd.core.membership import Member, MemberState
from meshd.core.soft_lane import SoftLane
from meshd_cms.types import NodeId


class Forgetting:
    """Takes members out of the table, and their records out of the store."""

    def __init__(self, context: Context, soft: SoftLane) -> None:
        self._context = context
        self._soft = soft
        self._orphans: dict[NodeId, float] = {}  # owner -> since when it is not listed

    def sweep(self) -> None:
        """Forget members that are gone for long, and records of nobody."""
        context, config = self._context, self._context.config
        for member in context.members:
            if member.is_live:
                continue
            left = member.state is MemberState.LEFT
            keep_s = config.left_keep_s if left else config.dead_keep_s
            if context.now_s - member.since_s >= keep_s:
                self._forget(member)
        context.members.expire_graveyard(context.now_s)
        self._forget_orphans()

    def make_room(self) -> None:
        """The table is full: who has been gone longest makes room for who comes next."""
        gone = [member for member in self._context.members if not member.is_live]
        if gone:
            self._forget(min(gone, key=lambda member: member.since_s))

    def drop_record(self, owner: NodeId) -> None:
        """Nothing of an owner stays."""
        store = self._context.store
        keys = tuple(key for key, _ in store.items(owner))
        if store.line(owner) is not None:
            store.forget(owner)
            self._context.notify(RecordChanged(owner, keys, reset=True))
        self._soft.forget(owner)
        self._context.touch()

    def _forget(self, member: Member) -> None:
        update = self._context.members.bury(member.node, self._context.now_s)
        self.drop_record(update.node)
        self._context.notify(MemberForgotten(update.node, update.name, update.address))

    def _forget_orphans(self) -> None:
        """Drop records whose owners were not listed for long: from a snapshot, or ahead of their claims."""
        context = self._context
        orphans = {
            owner: self._orphans.get(owner, context.now_s)
            for owner in context.store.owners()
            if owner != context.me.node and owner not in context.members
        }
        for owner, since_s in orphans.items():
            if context.now_s - since_s >= context.config.left_keep_s:
                self.drop_record(owner)
        self._orphans = orphans
