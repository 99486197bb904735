"""Two that claim one thing: an address, which only one can have, or a name, which people tell apart."""

from __future__ import annotations

from collections.abc import Callable

from meshd.core.context import Context
from meshd.core.events import AddressContested, NameContested
from meshd.core.membership import Member, MemberState, Transition
from meshd_cms.types import NodeId


class Contests:
    """Finds and tells them; `accuse` is called with the loser of an address."""

    def __init__(self, context: Context, accuse: Callable[[Member], None]) -> None:
        self._context = context
        self._accuse = accuse
        self._contested_s: dict[NodeId, float] = {}  # when a loser of an address was last accused

    def over_address(self, transition: Transition, other: Member | None) -> None:
        """Two live members with one address: the later life keeps it, the other has to show itself."""
        context, member = self._context, transition.member
        if member is None or other is None or other.node == member.node:
            return
        if not member.is_live or not other.is_live or member.address != other.address:
            return
        holder = context.members.at_address(member.address)
        assert holder is not None
        loser = other if holder.node == member.node else member
        accused_s = self._contested_s.get(loser.node)
        if accused_s is not None and context.now_s - accused_s < context.config.contest_gap_s:
            return  # it has shown itself since: two that are both there, for a person to tell apart
        self._contested_s.pop(loser.node, None)
        self._contested_s[loser.node] = context.now_s
        if len(self._contested_s) > context.config.members_max:
            del self._contested_s[next(iter(self._contested_s))]
        context.count("addresses_contested")
        context.notify(AddressContested(member.address, holder.node, loser.node))
        if loser.state is MemberState.ALIVE:
            self._accuse(loser)

    def over_name(self, member: Member) -> None:
        """A member came: tell if others have its name."""
        update = member.update
        same = [one.node for one in self._context.members.live() if one.update.name == update.name]
        if update.name == self._context.me.name:
            same.append(self._context.me.node)
        for other in same:
            if other != member.node:
                self._context.notify(NameContested(update.name, member.node, other))
