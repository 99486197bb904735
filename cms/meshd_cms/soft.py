"""Soft state: load and progress. Unversioned, sequence-numbered within an epoch, with an age.

What is true at all times: for each (owner, key) the reading with the highest (epoch, sequence) ever
seen is held, until it is older than `expire_s`; only its owner can say that it still holds. Nothing here is
signed or relayed through the store: it travels in authenticated datagrams and in replies, straight from
its owner or with the age it had at the relay. It never touches a version or an incarnation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshd_cms.entries import pack_value
from meshd_cms.errors import InvalidKey, ValueTooLarge
from meshd_cms.types import Epoch, NodeId, Value

SOFT_KEY_BYTES_MAX: Final = 64
SOFT_VALUE_BYTES_MAX: Final = 512  # encoded; a reading rides in every ping, ack and reply


@dataclass(frozen=True, slots=True)
class SoftConfig:
    """Bounds of the table."""

    owners_max: int = 2048
    keys_per_owner_max: int = 16  # `load` and a few `task/<id>`
    expire_s: float = 10.0  # older readings are dropped; raising it trusts silent nodes longer


@dataclass(frozen=True, slots=True)
class SoftTold:
    """One reading as its owner itself tells it: whose it is, is who sealed the datagram."""

    sequence: int
    key: str
    value: Value
    age_s: float

    def by(self, owner: NodeId, epoch: Epoch) -> SoftItem:
        """The reading of this owner, in this life of it."""
        return SoftItem(owner, epoch, self.sequence, self.key, self.value, self.age_s)


@dataclass(frozen=True, slots=True)
class SoftItem:
    """One reading, and whose it is."""

    owner: NodeId
    epoch: Epoch
    sequence: int  # the owner's counter over all its soft keys within the epoch, >= 1
    key: str
    value: Value
    age_s: float  # at the moment of sending, >= 0

    @property
    def told(self) -> SoftTold:
        """What the owner itself sends of it."""
        return SoftTold(self.sequence, self.key, self.value, self.age_s)


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading as it is read here."""

    value: Value
    age_s: float


@dataclass(frozen=True, slots=True)
class _Held:
    item: SoftItem
    measured_at_s: float  # our clock


class SoftState:
    """The latest reading of every owner's soft keys."""

    def __init__(self, owner: NodeId, config: SoftConfig) -> None:
        self._owner = owner
        self._config = config
        self._sequence = 0
        self._table: dict[NodeId, dict[str, _Held]] = {}

    def publish(self, key: str, value: Value, epoch: Epoch, now_s: float) -> SoftItem:
        """Set a soft key of our own; the item to send has age 0.

        The caller sends `item(owner, key, now_s)` when it sends it later, so that the age is true.
        Our own oldest key makes room when there are `keys_per_owner_max`.

        Raises:
            InvalidKey: the key is empty or longer than `SOFT_KEY_BYTES_MAX`.
            InvalidValue: msgpack cannot carry the value.
            ValueTooLarge: it is over `SOFT_VALUE_BYTES_MAX` when encoded. Nothing was changed.
        """
        if not 0 < len(key) <= SOFT_KEY_BYTES_MAX:
            raise InvalidKey(f"a soft key is 1 to {SOFT_KEY_BYTES_MAX} characters: {key[:40]!r}")
        size_bytes = len(pack_value(value))
        if size_bytes > SOFT_VALUE_BYTES_MAX:
            raise ValueTooLarge(key, size_bytes, SOFT_VALUE_BYTES_MAX)
        self._sequence += 1
        item = SoftItem(self._owner, epoch, self._sequence, key, value, 0.0)
        held = self._table.setdefault(self._owner, {})
        if key not in held and len(held) >= self._config.keys_per_owner_max:
            del held[min(held, key=lambda name: (held[name].item.sequence, name))]
        held[key] = _Held(item, now_s)
        return item

    def observe(self, item: SoftItem, now_s: float) -> bool:
        """Take a reading learnt from elsewhere; True when it is newer than what we held.

        Not taken: one of our own, one that is as old as `expire_s`, one of an earlier epoch or sequence,
        and one that would exceed a bound. A higher epoch drops all readings of the lower one.
        """
        if item.owner == self._owner or item.age_s >= self._config.expire_s:
            return False
        held = self._table.get(item.owner)
        if held is None:
            if len(self._table) >= self._config.owners_max:
                return False
            held = {}
        epoch = max((other.item.epoch for other in held.values()), default=item.epoch)
        if item.epoch < epoch:
            return False
        if item.epoch > epoch:
            held = {}
        before = held.get(item.key)
        if before is None:
            if len(held) >= self._config.keys_per_owner_max:
                return False
        elif item.sequence <= before.item.sequence:
            return False
        held[item.key] = _Held(item, now_s - item.age_s)
        self._table[item.owner] = held
        return True

    def renew(
        self, owner: NodeId, epoch: Epoch, sequence: int, age_s: float, now_s: float
    ) -> str | None:
        """The owner says that a reading of this sequence still held, so long ago; returns its key.

        None when that reading is not held (it was never taken, has expired, or gave way to a newer one).
        """
        for key, held in self._table.get(owner, {}).items():
            if (held.item.epoch, held.item.sequence) == (epoch, sequence):
                measured_at_s = max(held.measured_at_s, now_s - age_s)
                self._table[owner][key] = _Held(held.item, measured_at_s)
                return key
        return None

    def read(self, owner: NodeId, key: str, now_s: float) -> Reading | None:
        """The reading with its age, or None when there is none younger than `expire_s`."""
        held = self._table.get(owner, {}).get(key)
        if held is None:
            return None
        age_s = max(0.0, now_s - held.measured_at_s)
        return Reading(held.item.value, age_s) if age_s < self._config.expire_s else None

    def item(self, owner: NodeId, key: str, now_s: float) -> SoftItem | None:
        """The reading as it may be sent now, its age included; None when there is none."""
        reading = self.read(owner, key, now_s)
        if reading is None:
            return None
        item = self._table[owner][key].item
        return SoftItem(owner, item.epoch, item.sequence, key, item.value, reading.age_s)

    def items(self, owner: NodeId, now_s: float) -> tuple[SoftItem, ...]:
        """All live readings of an owner, sorted by key."""
        found = (self.item(owner, key, now_s) for key in sorted(self._table.get(owner, {})))
        return tuple(item for item in found if item is not None)

    def expire(self, now_s: float) -> tuple[tuple[NodeId, str], ...]:
        """Drop what is too old; returns what was dropped, sorted."""
        dropped = [
            (owner, key)
            for owner, held in self._table.items()
            for key, one in held.items()
            if now_s - one.measured_at_s >= self._config.expire_s
        ]
        for owner, key in dropped:
            del self._table[owner][key]
            if not self._table[owner]:
                del self._table[owner]
        return tuple(sorted(dropped))

    def forget(self, owner: NodeId) -> None:
        """Drop all readings of an owner."""
        self._table.pop(owner, None)
