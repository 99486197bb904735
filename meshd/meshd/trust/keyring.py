"""The datagram keys of the mesh that this node holds, and which of them it seals and opens with. Pure.

Invariant: while a key changes, no datagram is lost between nodes that have the new one. A new key opens as soon
as it is here; we seal with it `SEAL_AFTER_S` later, when the others have it too; and the old one opens for
`FADE_S` more, for those who were slow. After a revocation it fades faster: the revoked node still has it.

Which key is in force is decreed by number and hash; a key is believed because its hash is that of a decree.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from meshd.core.decrees import COMMITMENT_BYTES, Decree

SEAL_AFTER_S: Final = 1.0
FADE_S: Final = 30.0
FADE_REVOKED_S: Final = 5.0
HURRY_S: Final = 10.0
"""A key that changes so soon after a revocation changes because of it."""
KEYS_KEPT: Final = 3
"""Keys that are remembered: those in force, and before it, for where a decree turns out to be void."""
FINGERPRINT_CHARS: Final = 16


@dataclass(frozen=True, slots=True)
class DatagramKey:
    """One generation of the mesh's datagram key."""

    generation: int
    key: bytes = field(repr=False)

    @property
    def commitment(self) -> bytes:
        """What a decree names it by."""
        return hashlib.blake2b(self.key, digest_size=COMMITMENT_BYTES).digest()

    @property
    def fingerprint(self) -> str:
        """For people; tells nothing of the key."""
        return self.commitment.hex()[:FINGERPRINT_CHARS]


class KeyRing:
    """The keys of one node. Told the time, monotonic.

    Args:
        keys: what is held: first the one with which this node joined.
        decree: what is in force as far as it is known, None: the first one.
    """

    def __init__(self, keys: Iterable[DatagramKey], decree: Decree | None = None) -> None:
        self._keys = {each.commitment: each for each in keys}
        self._current = next(iter(self._keys))
        self._decree = decree
        self._next: bytes | None = None
        self._switch_s = math.inf
        self._fading: dict[bytes, float] = {}  # until when
        self._hurry_until_s = -math.inf
        if decree is not None and decree.commitment in self._keys:
            self._current = decree.commitment
        elif decree is not None:
            # The latest that can have been in force: a higher one may have been made here and never decreed.
            past = [each for each in self._keys.values() if each.generation < decree.generation]
            latest = max(past, key=lambda each: each.generation, default=self.current)
            self._current = latest.commitment

    # -- what there is -----------------------------------------------------------------------------------

    @property
    def current(self) -> DatagramKey:
        """What we seal with."""
        return self._keys[self._current]

    @property
    def opening(self) -> tuple[bytes, ...]:
        """What we open with, the likeliest first."""
        named = [self._current, *([] if self._next is None else [self._next]), *self._fading]
        return tuple(self._keys[each].key for each in dict.fromkeys(named))

    @property
    def wanted(self) -> Decree | None:
        """The decree that names a key which is not here."""
        decree = self._decree
        return None if decree is None or decree.commitment in self._keys else decree

    @property
    def highest(self) -> int:
        """The highest generation known, held or decreed."""
        decreed = 0 if self._decree is None else self._decree.generation
        return max(decreed, *(each.generation for each in self._keys.values()))

    @property
    def deadline_s(self) -> float:
        """When `advance` is due."""
        return min(self._switch_s, *self._fading.values(), math.inf)

    def held(self) -> tuple[DatagramKey, ...]:
        """All keys, the latest first."""
        return tuple(sorted(self._keys.values(), key=lambda each: -each.generation))

    def get(self, commitment: bytes) -> DatagramKey | None:
        """The key that a decree names so."""
        return self._keys.get(commitment)

    # -- what happens ------------------------------------------------------------------------------------

    def decreed(self, decree: Decree | None, now_s: float) -> None:
        """This is in force now."""
        self._decree = decree
        self._settle(now_s)

    def add(self, key: bytes, now_s: float) -> bool:
        """A peer gave a key; whether it is the one that is wanted."""
        wanted = self.wanted
        if wanted is None:
            return False
        found = DatagramKey(wanted.generation, key)
        if not hmac.compare_digest(found.commitment, wanted.commitment):
            return False
        self._keys[found.commitment] = found
        self._settle(now_s)
        return True

    def hold(self, key: DatagramKey) -> None:
        """Hold a new key of our own, to be decreed next."""
        self._keys[key.commitment] = key

    def revoked(self, now_s: float) -> None:
        """A node was revoked: what it holds is to be worth nothing soon."""
        self._hurry_until_s = now_s + HURRY_S
        for commitment, until_s in self._fading.items():
            self._fading[commitment] = min(until_s, now_s + FADE_REVOKED_S)

    def advance(self, now_s: float) -> bool:
        """Switch and drop what is due; whether anything changed."""
        changed = False
        if self._next is not None and now_s >= self._switch_s:
            fade_s = FADE_REVOKED_S if now_s < self._hurry_until_s else FADE_S
            self._fading.pop(self._next, None)
            self._fading[self._current] = now_s + fade_s
            self._current, self._next, self._switch_s = self._next, None, math.inf
            changed = True
        for commitment in [each for each, until_s in self._fading.items() if now_s >= until_s]:
            del self._fading[commitment]
            changed = True
        if changed:
            self._forget()
        return changed

    def _settle(self, now_s: float) -> None:
        decree = self._decree
        if decree is None or decree.commitment not in self._keys:
            return
        if decree.commitment == self._current:
            self._next, self._switch_s = None, math.inf
        elif decree.commitment != self._next:
            self._next, self._switch_s = decree.commitment, now_s + SEAL_AFTER_S

    def _forget(self) -> None:
        """Keep the latest and what is in use."""
        kept = {each.commitment for each in self.held()[:KEYS_KEPT]}
        used = {self._current, self._next, *self._fading}
        self._keys = {
            commitment: key
            for commitment, key in self._keys.items()
            if commitment in kept or commitment in used
        }
