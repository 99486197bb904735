"""The six digits that are typed in place of a token, and SPAKE2 around them.

Invariant: of one PIN, at most `ATTEMPTS_MAX` guesses are ever compared, whoever makes them and however many at
once, and a guess is all that an exchange tells either side (RFC 9382): nobody can record one and try out PINs at
home. Both sides mix in the certificate that the inviter showed in the TLS handshake, so an exchange that is
passed on by somebody in between fails as a wrong PIN does.

spake2 is pure Python and not constant in time. An exchange takes some 25 ms, with fresh random numbers each; what
its timing tells is drowned by a network, and the PIN is gone after minutes.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

from meshd.trust.certificates import Role
from meshd.trust.join_errors import JoinRefused, MalformedMessage, Refusal, TokenWrong
from meshd.trust.join_messages import SPAKE2_BYTES
from meshd.trust.join_proofs import equal, pin_joiner_mac

ATTEMPTS_MAX: Final = 3
PIN_TTL_S: Final = 300.0
PIN_TTL_MAX_S: Final = 3_600.0

_JOINER: Final = b"meshd pin v1 joiner"
_INVITER: Final = b"meshd pin v1 inviter\0"
_DIGITS: Final = 6


def draw_pin() -> str:
    """Six random digits, such as 481516."""
    return f"{secrets.randbelow(10**_DIGITS):0{_DIGITS}d}"


def pin_text(pin: str) -> str:
    """A PIN as people read it: 481-516."""
    return f"{pin[:3]}-{pin[3:]}"


def parse_pin(text: str) -> str:
    """The digits of a PIN, however it was typed.

    Raises:
        TokenWrong: it is none.
    """
    digits = text.replace("-", "").replace(" ", "")
    if len(digits) != _DIGITS or not digits.isascii() or not digits.isdecimal():
        raise TokenWrong(
            f"{text!r} is no PIN: type the six digits that `meshd invite --pin` shows, such as 481-516"
        )
    return digits


class PinExchange(Protocol):
    """One side of one exchange."""

    @property
    def message(self) -> bytes:
        """What the other side is to be told, SPAKE2_BYTES."""
        ...

    def finish(self, message: bytes) -> bytes:
        """The shared key, 32 bytes; another one on each side where the PINs differ. Once only.

        Raises:
            MalformedMessage: the other side's message is none.
        """
        ...


class _Exchange:
    def __init__(self, side: Any) -> None:
        self._side = side
        self.message = cast("bytes", side.start())

    def finish(self, message: bytes) -> bytes:
        if len(message) != SPAKE2_BYTES:
            raise MalformedMessage("not a message of SPAKE2")
        library = _spake2()
        refused = (library.SPAKEError, library.ed25519_basic.NotOnCurve, ValueError, AssertionError)
        try:
            return cast("bytes", self._side.finish(message))
        except refused as error:
            raise MalformedMessage(f"not a message of SPAKE2: {error}") from error


def joiner_exchange(pin: str, certificate: bytes) -> PinExchange:
    """The joiner's side; `certificate` is the `certificate_hash` of what the inviter showed."""
    ours = _spake2().SPAKE2_A
    return _Exchange(ours(pin.encode("ascii"), idA=_JOINER, idB=_INVITER + certificate))


def inviter_exchange(pin: str, certificate: bytes) -> PinExchange:
    """The inviter's side."""
    ours = _spake2().SPAKE2_B
    return _Exchange(ours(pin.encode("ascii"), idA=_JOINER, idB=_INVITER + certificate))


def _spake2() -> Any:
    """The library: it ships no types, and is loaded only where a PIN is used."""
    return importlib.import_module("spake2")


@dataclass(frozen=True, slots=True)
class OpenPin:
    """A PIN that may be joined with."""

    pin: str
    role: Role
    expires_at_s: float
    attempts_left: int


class PinDesk:
    """The one PIN of an inviter; in memory only, so it does not survive a restart.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: OpenPin | None = None

    def open(self, role: Role, ttl_s: float) -> OpenPin:
        """Draw a PIN; one that was open before is void."""
        expires_at_s = self._clock() + min(ttl_s, PIN_TTL_MAX_S)
        self._open = OpenPin(draw_pin(), role, expires_at_s, ATTEMPTS_MAX)
        return self._open

    def close(self) -> bool:
        """Make the PIN void; whether there was one."""
        there, self._open = self.current is not None, None
        return there

    @property
    def current(self) -> OpenPin | None:
        """The PIN that is open now."""
        if self._open is not None and self._clock() >= self._open.expires_at_s:
            self._open = None
        return self._open

    def required(self) -> OpenPin:
        """The PIN that is open now.

        Raises:
            JoinRefused: NO_PIN.
        """
        found = self.current
        if found is None:
            raise JoinRefused(Refusal.NO_PIN)
        return found

    def compare(self, pin: str, shared: bytes, mac: bytes) -> OpenPin:
        """Judge a joiner that began with `pin`: the PIN it is let in with. A wrong one costs an attempt.

        Raises:
            JoinRefused: WRONG_PIN; or NO_PIN, when it is not the PIN that is open now.
        """
        found = self.required()
        if found.pin != pin:  # it began with one that is void since
            raise JoinRefused(Refusal.NO_PIN)
        if equal(pin_joiner_mac(shared), mac):
            return found
        left = found.attempts_left - 1
        self._open = OpenPin(found.pin, found.role, found.expires_at_s, left) if left > 0 else None
        raise JoinRefused(Refusal.WRONG_PIN)

    def take(self, pin: str) -> OpenPin:
        """Use the PIN up.

        Raises:
            JoinRefused: NO_PIN, when it is not the PIN that is open now.
        """
        found = self.required()
        if found.pin != pin:
            raise JoinRefused(Refusal.NO_PIN)
        self._open = None
        return found
