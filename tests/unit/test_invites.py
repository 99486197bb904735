"""Invitations: how often each lets somebody in, whatever happens, and what is kept of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshd.trust.certificates import Role
from meshd.trust.invites import (
    CLOSED_KEPT_S,
    KEPT_MAX,
    OPEN_MAX,
    USES_MAX,
    Invite,
    InviteBook,
    InvitesDamaged,
    InviteState,
    TooManyInvites,
)
from meshd.trust.join_errors import JoinRefused, Refusal
from meshd.trust.join_proofs import invite_id, invite_key
from meshd_cms import NodeId

NOW_S = 1_800_000_000.0


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


def added(
    book: InviteBook, number: int = 1, *, uses: int = 1, ttl_s: float = 600.0, now_s: float = NOW_S
) -> Invite:
    return book.add(number.to_bytes(16, "big"), Role.MEMBER, uses, ttl_s, now_s)


def refusal(book: InviteBook, invite: Invite, who: int, now_s: float = NOW_S) -> Refusal:
    with pytest.raises(JoinRefused) as raised:
        book.take(invite.id, node(who), "board", now_s)
    return raised.value.refusal


def test_what_is_kept_of_a_secret_is_a_hash() -> None:
    book, secret = InviteBook(), b"0123456789abcdef"
    invite = book.add(secret, Role.OBSERVER, 1, 60.0, NOW_S)
    assert (invite.id, invite.key) == (invite_id(secret), invite_key(secret))
    assert secret not in book.saved()
    assert secret.hex() not in repr(invite)
    assert invite.key.hex() not in repr(invite)


def test_each_way_to_be_closed_has_its_reason() -> None:
    book = InviteBook()
    used, expired, revoked = (added(book, number) for number in (1, 2, 3))
    book.take(used.id, node(1), "a", NOW_S)
    book.revoke(revoked.id)
    assert refusal(book, used, 2) is Refusal.USED
    assert refusal(book, expired, 2, NOW_S + 600.0) is Refusal.EXPIRED
    assert refusal(book, revoked, 2) is Refusal.REVOKED
    assert refusal(InviteBook(), used, 2) is Refusal.UNKNOWN


def test_who_was_let_in_may_come_again_unless_it_was_revoked() -> None:
    book = InviteBook()
    invite = added(book)
    book.take(invite.id, node(1), "a", NOW_S)
    again = book.take(invite.id, node(1), "a", NOW_S + 10_000.0)
    assert len(again.uses) == 1
    book.revoke(invite.id)
    assert refusal(book, invite, 1) is Refusal.REVOKED


def test_bounds() -> None:
    book = InviteBook()
    assert added(book, 0, uses=10**6, ttl_s=1e12).uses_max == USES_MAX
    for number in range(1, OPEN_MAX):
        added(book, number)
    with pytest.raises(TooManyInvites, match="meshd invite list"):
        added(book, OPEN_MAX)
    later_s = NOW_S + 601.0
    for number in range(OPEN_MAX, KEPT_MAX + OPEN_MAX):
        later_s += 601.0
        added(book, number, now_s=later_s)
    assert len(book.all()) == KEPT_MAX
    added(book, 10_000, now_s=later_s + 2 * CLOSED_KEPT_S)
    assert {each.made_at_s for each in book.all()} >= {NOW_S, later_s + 2 * CLOSED_KEPT_S}
    assert len(book.all()) == 2


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_a_damaged_book_is_left_as_it_was(data: bytes) -> None:
    book = InviteBook()
    added(book)
    before = book.saved()
    try:
        book.load(data)
    except InvitesDamaged:
        assert book.saved() == before
    else:
        assert data == book.saved()


def test_a_book_with_a_flipped_bit_loads_or_is_refused() -> None:
    book = InviteBook()
    book.take(added(book).id, node(7), "board", NOW_S)
    saved, rng = book.saved(), random.Random(3)
    for _ in range(300):
        spoilt = bytearray(saved)
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        other = InviteBook()
        try:
            other.load(bytes(spoilt))
        except InvitesDamaged:
            assert other.all() == ()


class Crashing(RuleBasedStateMachine):
    """One invite, its joiners, and power cuts: before the disk has a use, or before the joiner hears of it."""

    USES = 2

    def __init__(self) -> None:
        super().__init__()
        self.book = InviteBook()
        self.invite = added(self.book, uses=self.USES)
        self.disk = self.book.saved()
        self.granted: set[int] = set()

    @rule(who=st.integers(1, 5))
    def join(self, who: int) -> None:
        """As the desk does it: count, write, and only then give."""
        try:
            self.book.take(self.invite.id, node(who), "board", NOW_S)
        except JoinRefused:
            return
        self.disk = self.book.saved()
        self.granted.add(who)

    @rule(who=st.integers(1, 5), written=st.booleans())
    def join_and_crash(self, who: int, written: bool) -> None:
        """The certificate was not given."""
        try:
            self.book.take(self.invite.id, node(who), "board", NOW_S)
        except JoinRefused:
            return
        if written:
            self.disk = self.book.saved()
        self.restart()

    @rule()
    def restart(self) -> None:
        self.book = InviteBook()
        self.book.load(self.disk)

    @invariant()
    def no_more_than_it_is_for(self) -> None:
        assert len(self.granted) <= self.USES
        uses = {int.from_bytes(use.node, "big") for use in self.book.all()[0].uses}
        assert self.granted <= uses
        full = len(uses) == self.USES
        state = self.book.all()[0].state(NOW_S)
        assert state is (InviteState.USED if full else InviteState.OPEN)


TestCrashing = Crashing.TestCase
TestCrashing.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
