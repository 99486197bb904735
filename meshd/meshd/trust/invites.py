"""The invitations that an inviter has given out, and who used them. Pure: whoever holds the book keeps it on disk.

Invariant: an invite lets in at most `uses_max` different keys, none after its end, none once it is revoked. A key
that was let in may come again (its connection may have broken before it had its certificate) and does not count
twice. What is kept of a secret is a hash. Closed invites are remembered for a while, so that a late joiner is told
why; all of it is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, TypeGuard

from meshd.trust.certificates import Role
from meshd.trust.join_errors import JoinRefused, Refusal
from meshd.trust.join_messages import INVITE_ID_BYTES, NAME_BYTES_MAX
from meshd.trust.join_proofs import invite_id, invite_key
from meshd_cms.errors import CodecError
from meshd_cms.packing import pack, unpack
from meshd_cms.types import NODE_ID_BYTES, NodeId

OPEN_MAX: Final = 64
"""Invites open at once."""
KEPT_MAX: Final = 256
"""Invites remembered, closed ones included."""
CLOSED_KEPT_S: Final = 7 * 86_400.0
USES_MAX: Final = 256
TTL_MAX_S: Final = 30 * 86_400.0
BYTES_MAX: Final = 8 << 20

_KEY_BYTES: Final = 32


class InviteState(StrEnum):
    """What can be done with an invite."""

    OPEN = "open"
    USED = "used"
    EXPIRED = "expired"
    REVOKED = "revoked"


_REFUSALS: Final[Mapping[InviteState, Refusal]] = {
    InviteState.USED: Refusal.USED,
    InviteState.EXPIRED: Refusal.EXPIRED,
    InviteState.REVOKED: Refusal.REVOKED,
}


class TooManyInvites(Exception):
    """OPEN_MAX are open. State: none was added."""

    code = "too_many_invites"


class InvitesDamaged(ValueError):
    """Bytes that are no book of invites."""


@dataclass(frozen=True, slots=True)
class Use:
    """A joiner that an invite let in."""

    node: NodeId  # the hash of its key
    name: str  # what it calls itself
    at_s: float


@dataclass(frozen=True, slots=True)
class Invite:
    """One invitation."""

    id: bytes
    key: bytes = field(repr=False)  # `invite_key` of the secret, which is not kept
    role: Role
    made_at_s: float  # since 1970, as all times here
    expires_at_s: float
    uses_max: int
    uses: tuple[Use, ...] = ()
    revoked: bool = False

    def state(self, now_s: float) -> InviteState:
        """What can be done with it now."""
        if self.revoked:
            return InviteState.REVOKED
        if len(self.uses) >= self.uses_max:
            return InviteState.USED
        return InviteState.EXPIRED if now_s >= self.expires_at_s else InviteState.OPEN


class InviteBook:
    """All invites of one inviter. It is a value in a box: `saved` and `load` round-trip."""

    def __init__(self) -> None:
        self._invites: dict[bytes, Invite] = {}

    def add(self, secret: bytes, role: Role, uses_max: int, ttl_s: float, now_s: float) -> Invite:
        """Note a new invitation with this secret.

        Raises:
            TooManyInvites: nothing was added.
        """
        self._forget(now_s)
        opened = [each for each in self._invites.values() if _is_open(each, now_s)]
        if len(opened) >= OPEN_MAX:
            raise TooManyInvites(
                f"{OPEN_MAX} invitations are open: revoke some (`meshd invite list`, `meshd invite revoke "
                "ID`), or let one token serve several devices (`meshd invite --uses N`)"
            )
        invite = Invite(
            id=invite_id(secret),
            key=invite_key(secret),
            role=role,
            made_at_s=now_s,
            expires_at_s=now_s + min(ttl_s, TTL_MAX_S),
            uses_max=min(max(uses_max, 1), USES_MAX),
        )
        self._invites[invite.id] = invite
        return invite

    def all(self) -> tuple[Invite, ...]:
        """What is remembered, the latest first."""
        return tuple(sorted(self._invites.values(), key=lambda each: -each.made_at_s))

    def find(self, identifier: bytes) -> Invite:
        """The invite with this id, in whatever state.

        Raises:
            JoinRefused: UNKNOWN.
        """
        found = self._invites.get(identifier)
        if found is None:
            raise JoinRefused(Refusal.UNKNOWN)
        return found

    def take(self, identifier: bytes, node: NodeId, name: str, now_s: float) -> Invite:
        """Count a joiner, whose proof was checked. The certificate is given after this is on disk.

        Raises:
            JoinRefused: it may not be let in; nothing was changed.
        """
        invite = self.find(identifier)
        state = invite.state(now_s)
        if state is not InviteState.REVOKED and any(use.node == node for use in invite.uses):
            return invite
        if state is not InviteState.OPEN:
            raise JoinRefused(_REFUSALS[state])
        taken = replace(invite, uses=(*invite.uses, Use(node, name, now_s)))
        self._invites[identifier] = taken
        return taken

    def revoke(self, identifier: bytes) -> Invite:
        """Let nobody in with it any more. Who is in stays in: that takes `meshd revoke`.

        Raises:
            JoinRefused: UNKNOWN.
        """
        revoked = replace(self.find(identifier), revoked=True)
        self._invites[identifier] = revoked
        return revoked

    def has_some(self) -> bool:
        """Whether there is anybody to answer."""
        return bool(self._invites)

    def _forget(self, now_s: float) -> None:
        """Drop what was closed long ago, and the oldest closed ones above KEPT_MAX."""
        closed = [each for each in self._invites.values() if not _is_open(each, now_s)]
        surplus = len(self._invites) - KEPT_MAX + 1
        for index, invite in enumerate(sorted(closed, key=lambda each: each.expires_at_s)):
            if index < surplus or invite.expires_at_s + CLOSED_KEPT_S < now_s:
                del self._invites[invite.id]

    # -- bytes ---------------------------------------------------------------------------------------------

    def saved(self) -> bytes:
        """The book, for a disk."""
        return pack(
            [
                [
                    each.id,
                    each.key,
                    each.role.value,
                    each.made_at_s,
                    each.expires_at_s,
                    each.uses_max,
                    each.revoked,
                    [[use.node, use.name, use.at_s] for use in each.uses],
                ]
                for each in self._invites.values()
            ]
        )

    def load(self, data: bytes) -> None:
        """Become what `saved` gave.

        Raises:
            InvitesDamaged: the bytes are not from there; the book is as it was.
        """
        try:
            items = _list(unpack(data))
            invites = [_invite(_list(each)) for each in items]
        except (CodecError, ValueError, TypeError, IndexError) as error:
            raise InvitesDamaged(f"not a book of invites: {error}") from error
        self._invites = {each.id: each for each in invites}


def _is_open(invite: Invite, now_s: float) -> bool:
    return invite.state(now_s) is InviteState.OPEN


def _invite(fields: list[object]) -> Invite:
    identifier, key, role, made, expires, uses_max, revoked, uses = fields
    return Invite(
        id=_bytes(identifier, INVITE_ID_BYTES),
        key=_bytes(key, _KEY_BYTES),
        role=Role(str(role)),
        made_at_s=_number(made),
        expires_at_s=_number(expires),
        uses_max=int(_number(uses_max)),
        uses=tuple(_use(_list(each)) for each in _list(uses)),
        revoked=revoked is True,
    )


def _use(fields: list[object]) -> Use:
    node, name, at_s = fields
    return Use(NodeId(_bytes(node, NODE_ID_BYTES)), str(name)[:NAME_BYTES_MAX], _number(at_s))


def _bytes(value: object, length: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != length:
        raise InvitesDamaged("bytes of another length")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise InvitesDamaged("not a number")
    return float(value)


def _list(value: object) -> list[object]:
    if not _is_list(value):
        raise InvitesDamaged("not a list")
    return value


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)
