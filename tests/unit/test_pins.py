"""PINs: how they are typed, and how many guesses each bears."""

from __future__ import annotations

import pytest

from meshd.trust.certificates import Role
from meshd.trust.join_errors import JoinRefused, MalformedMessage, Refusal, TokenWrong
from meshd.trust.join_proofs import pin_joiner_mac
from meshd.trust.pins import (
    ATTEMPTS_MAX,
    PIN_TTL_MAX_S,
    PinDesk,
    draw_pin,
    inviter_exchange,
    joiner_exchange,
    parse_pin,
    pin_text,
)

CERTIFICATE = bytes(32)
SHARED = b"k" * 32
RIGHT = pin_joiner_mac(SHARED)
WRONG = pin_joiner_mac(b"x" * 32)


def refusal(desk: PinDesk, pin: str, mac: bytes) -> Refusal:
    with pytest.raises(JoinRefused) as raised:
        desk.compare(pin, SHARED, mac)
    return raised.value.refusal


def test_a_pin_is_read_however_it_is_typed() -> None:
    pin = draw_pin()
    assert len(pin) == 6
    for typed in (pin, pin_text(pin), f" {pin[:3]} {pin[3:]} "):
        assert parse_pin(typed) == pin
    for wrong in ("", "48151", "4815166", "48151a", "٤٨١٥١٦"):
        with pytest.raises(TokenWrong, match="six digits"):
            parse_pin(wrong)


def test_both_sides_get_one_key_with_one_pin_and_one_certificate() -> None:
    def keys(ours: str, theirs: str, seen: bytes) -> tuple[bytes, bytes]:
        joiner, inviter = joiner_exchange(ours, seen), inviter_exchange(theirs, CERTIFICATE)
        return joiner.finish(inviter.message), inviter.finish(joiner.message)

    one, other = keys("481516", "481516", CERTIFICATE)
    assert one == other
    for ours, theirs, seen in (
        ("481516", "481517", CERTIFICATE),
        ("481516", "481516", b"\x01" * 32),
    ):
        one, other = keys(ours, theirs, seen)
        assert one != other


def test_what_is_no_message_of_spake2_is_refused() -> None:
    own = joiner_exchange("481516", CERTIFICATE)
    small = b"B" + (1).to_bytes(32, "little")  # the neutral element
    order_two = b"B" + (2**255 - 20).to_bytes(32, "little")
    for message in (b"", b"B" * 33, b"A" + bytes(32), own.message, small, order_two):
        with pytest.raises(MalformedMessage):
            joiner_exchange("481516", CERTIFICATE).finish(message)
    with pytest.raises(MalformedMessage):
        own.finish(b"B" + own.message[1:])  # our own, sent back


def test_three_wrong_guesses_and_it_is_gone() -> None:
    desk = PinDesk(lambda: 0.0)
    opened = desk.open(Role.MEMBER, 300.0)
    for left in range(ATTEMPTS_MAX - 1, -1, -1):
        assert refusal(desk, opened.pin, WRONG) is Refusal.WRONG_PIN
        current = desk.current
        assert (current.attempts_left if current else 0) == left
    assert refusal(desk, opened.pin, RIGHT) is Refusal.NO_PIN


def test_a_right_guess_is_used_up_once() -> None:
    desk = PinDesk(lambda: 0.0)
    opened = desk.open(Role.ISSUER, 300.0)
    refusal(desk, opened.pin, WRONG)
    assert desk.compare(opened.pin, SHARED, RIGHT).role is Role.ISSUER
    assert desk.compare(opened.pin, SHARED, RIGHT).attempts_left == ATTEMPTS_MAX - 1
    desk.take(opened.pin)
    with pytest.raises(JoinRefused):
        desk.take(opened.pin)


def test_a_pin_ends_by_time_by_another_and_by_hand() -> None:
    now_s = [0.0]
    desk = PinDesk(lambda: now_s[0])
    first = desk.open(Role.MEMBER, 1e9)
    assert first.expires_at_s == PIN_TTL_MAX_S
    second = desk.open(Role.MEMBER, 300.0)
    if first.pin != second.pin:
        assert refusal(desk, first.pin, RIGHT) is Refusal.NO_PIN
    now_s[0] = 300.0
    assert refusal(desk, second.pin, RIGHT) is Refusal.NO_PIN
    desk.open(Role.MEMBER, 300.0)
    assert desk.close()
    assert not desk.close()
