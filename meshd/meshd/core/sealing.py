"""Sealed datagrams: authenticated encryption with one key per sender and epoch. Pure.

Invariant: an `Opener` hands out each datagram at most once, only if it was sealed under a key of this
mesh, and never as current one of an older epoch than the newest it has authenticated from that sender.
What is not authentic changes nothing: no window moves, no sender is remembered, no cache entry is evicted.

A datagram of an older epoch is either late or replayed, or its sender has lost its epoch and has to be told;
an answer may say so, and nothing else may come of it. So a few of them a second are opened and marked
(`Opened.is_old_epoch`), without a look at any window: the same one may be opened again.

The wire, all integers big-endian (see docs/protocol.md and decision 0005)::

    1 B format | 4 B mesh tag | 16 B sender | 6 B epoch | 6 B counter | ciphertext | 16 B AEAD tag
    '------------------- associated data, in clear -------------------'

Format 1 is for anyone in the mesh (a first contact); format 2 is for one receiver, whose id is part of the
associated data and does not travel: recorded on its way to one node, it says nothing to another.

The key is HKDF-SHA256(mesh datagram key, salt = mesh id, info = b"meshd datagram v1" + sender + epoch)
and the nonce is the counter, so a pair (key, nonce) is used once as long as an epoch is used once: the
owner of the epoch persists it before it seals. Everybody in the mesh holds the mesh datagram key, so a
seal proves "a member sent this", not which one; what must be proof against members is signed (CMS).
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meshd.core.allowance import Allowance
from meshd_cms.types import EPOCH_MAX, Epoch, MeshId, NodeId

FORMAT_ANYONE: Final = 1
FORMAT_ONE: Final = 2
DATAGRAM_BYTES_MAX: Final = 1400
"""One sealed datagram: fits an Ethernet or Wi-Fi frame with room for IPv6 and a tunnel."""
KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 8
COUNTER_MAX: Final = 2**48 - 1
TAG_BYTES: Final = 4
"""Of the mesh tag, in a datagram: strangers' noise that passes it by chance costs one failed decryption."""
OLD_EPOCHS_PER_S: Final = 4
"""Datagrams of older epochs that are opened, of each sender; more are dropped unopened."""
WINDOW_BITS: Final = 1024
SENDERS_MAX: Final = 4096
"""Senders an `Opener` remembers; the least recently heard is forgotten above it."""

_HEADER: Final = struct.Struct(f">B{TAG_BYTES}s16s6s6s")
_HEADER_BYTES: Final = _HEADER.size
_FORMATS: Final = (FORMAT_ANYONE, FORMAT_ONE)
_NUMBER_BYTES: Final = 6  # of the epoch and of the counter
_NO_NUMBER: Final = bytes(_NUMBER_BYTES)
_AEAD_TAG_BYTES: Final = 16
_NONCE_PREFIX: Final = bytes(6)
_WINDOW_MASK: Final = (1 << WINDOW_BITS) - 1
OVERHEAD_BYTES: Final = _HEADER.size + _AEAD_TAG_BYTES
DATAGRAM_PAYLOAD_BYTES_MAX: Final = DATAGRAM_BYTES_MAX - OVERHEAD_BYTES
"""What is left for the protocol inside: 1,351 bytes."""


class SealingError(Exception):
    """Our own misuse of a `Sealer`; nothing was sealed and no counter was used.

    SealingError
      PayloadTooLarge     code payload_too_large
      CounterExhausted    code counter_exhausted: a new epoch is needed
    """

    code = "sealing_error"


class PayloadTooLarge(SealingError):
    """The payload does not fit a datagram."""

    code = "payload_too_large"


class CounterExhausted(SealingError):
    """The counter of this epoch would wrap; sealing again would reuse a nonce."""

    code = "counter_exhausted"


@dataclass(frozen=True, slots=True)
class Floor:
    """How far a sender was heard under a key: what it sealed up to there does not open again."""

    key_id: bytes
    sender: NodeId
    epoch: Epoch
    counter: int


class DropReason(StrEnum):
    """Why a datagram was not opened, in the order of the checks: cheap ones come before any crypto."""

    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    WRONG_FORMAT = "wrong_format"  # another format number, or an epoch that cannot be one
    OTHER_MESH = "other_mesh"
    OWN = "own"  # our own datagram came back
    OLD_EPOCH = "old_epoch"  # an earlier life of that sender, and more of it than is opened
    REPLAYED = "replayed"  # seen already, or older than the window can tell
    BAD_SEAL = "bad_seal"  # another key, or meant for another node


class Opened(NamedTuple):
    """An authentic datagram, seen for the first time unless it is of an old epoch."""

    sender: NodeId
    epoch: Epoch
    payload: bytes
    is_old_epoch: bool = False  # an earlier life of the sender: tell it so, and do nothing else


@dataclass(frozen=True, slots=True)
class Dropped:
    """A datagram that was ignored and counted."""

    reason: DropReason


def mesh_tag(mesh: MeshId) -> bytes:
    """Eight bytes by which a mesh recognises its own without showing its id (for mDNS TXT)."""
    return hashlib.sha256(b"meshd mesh tag v1" + mesh).digest()[:8]


def key_id(key: bytes) -> bytes:
    """Eight bytes that tell a datagram key from others, and nothing else of it."""
    return hashlib.blake2b(key, digest_size=KEY_ID_BYTES, person=b"meshd key id").digest()


def _sender_aead(key: bytes, mesh: MeshId, sender: NodeId, epoch: int) -> ChaCha20Poly1305:
    info = b"meshd datagram v1" + sender + epoch.to_bytes(8, "big")
    return ChaCha20Poly1305(HKDF(hashes.SHA256(), KEY_BYTES, salt=mesh, info=info).derive(key))


class Sealer:
    """Seals this node's datagrams.

    `epoch` must never have been used by this node before: the shell persists it before it builds this.
    """

    def __init__(
        self, key: bytes, mesh: MeshId, me: NodeId, epoch: Epoch, *, counter: int = 0
    ) -> None:
        assert len(key) == KEY_BYTES
        self._key = key
        self._mesh = mesh
        self._me = me
        self._tag = mesh_tag(mesh)[:TAG_BYTES]
        self.rekey(epoch)
        self._counter = counter

    def rekey(self, epoch: Epoch) -> None:
        """Go on under a new epoch, with a new key and counter (the node's epoch was raised)."""
        assert 1 <= epoch <= EPOCH_MAX
        self._epoch = epoch
        self._counter = 0
        self._aead = _sender_aead(self._key, self._mesh, self._me, epoch)

    def use_key(self, key: bytes) -> None:
        """Go on under a new key of the mesh. The epoch stays and the counter goes on, so no nonce comes twice."""
        assert len(key) == KEY_BYTES
        self._key = key
        self._aead = _sender_aead(key, self._mesh, self._me, self._epoch)

    def seal(self, payload: bytes, to: NodeId | None = None) -> bytes:
        """The datagram that carries `payload` to a node, or to anyone: at most `DATAGRAM_BYTES_MAX` bytes.

        Raises:
            PayloadTooLarge: longer than `DATAGRAM_PAYLOAD_BYTES_MAX`.
            CounterExhausted: 2**48 - 1 datagrams were sealed in this epoch.
        """
        if len(payload) > DATAGRAM_PAYLOAD_BYTES_MAX:
            raise PayloadTooLarge(f"{len(payload)} bytes; at most {DATAGRAM_PAYLOAD_BYTES_MAX} fit")
        if self._counter >= COUNTER_MAX:
            raise CounterExhausted("the datagram counter would wrap: a new epoch is needed")
        self._counter += 1
        counter = self._counter.to_bytes(_NUMBER_BYTES, "big")
        epoch = self._epoch.to_bytes(_NUMBER_BYTES, "big")
        form = FORMAT_ANYONE if to is None else FORMAT_ONE
        header = _HEADER.pack(form, self._tag, self._me, epoch, counter)
        return header + self._aead.encrypt(_NONCE_PREFIX + counter, payload, header + (to or b""))


@dataclass(slots=True)
class _Sender:
    """What is known of one authenticated sender. `seen` bit i: counter `highest - i` was opened."""

    epoch: Epoch
    aead: ChaCha20Poly1305
    highest: int = 0
    seen: int = 0
    old: Allowance = field(default_factory=lambda: Allowance(OLD_EPOCHS_PER_S, OLD_EPOCHS_PER_S))

    def is_fresh(self, counter: int) -> bool:
        if counter > self.highest:
            return True
        behind = self.highest - counter
        return behind < WINDOW_BITS and not self.seen >> behind & 1

    def mark(self, counter: int) -> None:
        ahead = counter - self.highest
        if ahead > 0:
            kept = self.seen << ahead if ahead < WINDOW_BITS else 0
            self.seen = (kept | 1) & _WINDOW_MASK
            self.highest = counter
        else:
            self.seen |= 1 << -ahead


class _UnderKey:
    """Opens what was sealed under one key of the mesh, and remembers who was heard under it, and how far."""

    def __init__(self, key: bytes, mesh: MeshId, me: NodeId, senders_max: int) -> None:
        self.key = key
        self.id = key_id(key)
        self.senders: OrderedDict[NodeId, _Sender] = OrderedDict()
        self._mesh = mesh
        self._me = me
        self._senders_max = senders_max

    def open(
        self, datagram: bytes, sender: NodeId, epoch: Epoch, counter: bytes, now_s: float | None
    ) -> Opened | DropReason:
        """See `Opener.open`; most of what a quiet node does is this."""
        senders, number = self.senders, int.from_bytes(counter, "big")
        known = senders.get(sender)
        if known is None or epoch > known.epoch:  # remembered only on success
            aead = _sender_aead(self.key, self._mesh, sender, epoch)
        elif epoch < known.epoch:
            return self._open_old(datagram, sender, epoch, counter, known.old, now_s)
        elif number <= known.highest and not known.is_fresh(number):
            return DropReason.REPLAYED
        else:
            aead = known.aead
        payload = self._decrypt(aead, counter, datagram)
        if payload is None:
            return DropReason.BAD_SEAL
        if known is None or known.aead is not aead:
            known = senders[sender] = _Sender(epoch, aead)
            if len(senders) > self._senders_max:
                senders.popitem(last=False)
        known.mark(number)
        senders.move_to_end(sender)
        return Opened(sender, epoch, payload)

    def restore(self, floor: Floor) -> None:
        aead = _sender_aead(self.key, self._mesh, floor.sender, floor.epoch)
        known = _Sender(floor.epoch, aead, floor.counter, _WINDOW_MASK)
        self.senders[floor.sender] = known
        if len(self.senders) > self._senders_max:
            self.senders.popitem(last=False)

    def _open_old(
        self,
        datagram: bytes,
        sender: NodeId,
        epoch: Epoch,
        counter: bytes,
        allowance: Allowance,
        now_s: float | None,
    ) -> Opened | DropReason:
        """An earlier life speaks: whatever the outcome, nothing is remembered of it."""
        if now_s is None or allowance.left(now_s) < 1.0:
            return DropReason.OLD_EPOCH
        aead = _sender_aead(self.key, self._mesh, sender, epoch)
        payload = self._decrypt(aead, counter, datagram)
        if payload is None:
            return DropReason.BAD_SEAL
        allowance.take(now_s)  # what a stranger made up costs the sender nothing
        return Opened(sender, epoch, payload, is_old_epoch=True)

    def _decrypt(self, aead: ChaCha20Poly1305, counter: bytes, datagram: bytes) -> bytes | None:
        associated = datagram[:_HEADER_BYTES]
        if associated[0] == FORMAT_ONE:
            associated += self._me
        try:
            return aead.decrypt(_NONCE_PREFIX + counter, datagram[_HEADER_BYTES:], associated)
        except InvalidTag:
            return None


class Opener:
    """Opens what other members sealed.

    `keys` are the mesh datagram keys in force, the current one first; there is more than one only while
    keys rotate. Each has windows of its own: who spoils those of another, which any member can, spoils them
    for one key, and the next one heals it. Memory: at most `senders_max` senders of about 400 bytes a key.

    How far each was heard survives a restart if it is kept (`floors`, `restore`). What was sealed after it was
    last kept, before a crash, or by a sender forgotten for that bound, could be replayed once; the protocols
    inside bear duplicates.
    """

    def __init__(
        self, keys: Sequence[bytes], mesh: MeshId, me: NodeId, *, senders_max: int = SENDERS_MAX
    ) -> None:
        assert senders_max >= 1
        self._mesh = mesh
        self._me = me
        self._tag = mesh_tag(mesh)[:TAG_BYTES]
        self._senders_max = senders_max
        self._keys: tuple[_UnderKey, ...] = ()
        self._last: dict[NodeId, _UnderKey] = {}  # under which key a sender was heard last
        self._opened = 0
        self._opened_old = 0
        self._drops: Counter[DropReason] = Counter()
        self.use_keys(keys)

    def use_keys(self, keys: Sequence[bytes]) -> None:
        """Open under these keys of the mesh from now on, the current one first, and under no other.

        What was sealed under a key that is gone opens nowhere, so how far it was heard is forgotten with it.
        """
        assert keys
        held = {each.key: each for each in self._keys}
        self._keys = tuple(
            held.get(key) or _UnderKey(key, self._mesh, self._me, self._senders_max)
            for key in dict.fromkeys(keys)
        )
        self._last = {node: each for node, each in self._last.items() if each in self._keys}

    def open(self, datagram: bytes, now_s: float | None = None) -> Opened | Dropped:
        """The payload, or why there is none. Never raises, whatever the bytes.

        Args:
            datagram: as it came.
            now_s: monotonic; bounds how many of older epochs are opened. None: none of them is.
        """
        outcome = self._open(datagram, now_s)
        if isinstance(outcome, Opened):
            self._opened += 1
            self._opened_old += outcome.is_old_epoch
            return outcome
        self._drops[outcome] += 1
        return Dropped(outcome)

    def key_of(self, sender: NodeId) -> bytes | None:
        """The mesh key under which a node's latest datagram was sealed; None when none was opened."""
        under = self._last.get(sender)
        return None if under is None else under.key

    def floors(self) -> tuple[Floor, ...]:
        """How far each sender was heard under each key, the least recently heard first: for a disk."""
        return tuple(
            Floor(under.id, sender, known.epoch, known.highest)
            for under in reversed(self._keys)
            for sender, known in under.senders.items()
        )

    def restore(self, floors: Iterable[Floor]) -> None:
        """Before anything was opened: what an earlier run of this process opened does not open again.

        Floors under keys that are not in force say nothing any more.
        """
        held = {under.id: under for under in self._keys}
        for floor in floors:
            if floor.key_id in held and floor.epoch >= 1:
                held[floor.key_id].restore(floor)

    def statistics(self) -> Mapping[str, int]:
        """Counts since the start: `opened`, of them `opened_old_epoch`, and every `DropReason` by its value."""
        return {"opened": self._opened, "opened_old_epoch": self._opened_old} | {
            reason.value: self._drops[reason] for reason in DropReason
        }

    def _open(self, datagram: bytes, now_s: float | None) -> Opened | DropReason:
        size = len(datagram)
        if size < OVERHEAD_BYTES:
            return DropReason.TOO_SHORT
        if size > DATAGRAM_BYTES_MAX:
            return DropReason.TOO_LONG
        form, tag, sender, epoch_bytes, counter = _HEADER.unpack_from(datagram)
        epoch = Epoch(int.from_bytes(epoch_bytes, "big"))
        if form not in _FORMATS or epoch == 0 or counter == _NO_NUMBER:
            return DropReason.WRONG_FORMAT
        if tag != self._tag:
            return DropReason.OTHER_MESH
        if sender == self._me:
            return DropReason.OWN
        last = self._last.get(sender)
        reason = DropReason.BAD_SEAL
        for under in self._keys if len(self._keys) == 1 else self._in_order(last):
            outcome = under.open(datagram, sender, epoch, counter, now_s)
            if isinstance(outcome, Opened):
                if under is not last and not outcome.is_old_epoch:
                    self._last[sender] = under
                    if len(self._last) > self._senders_max:
                        del self._last[next(iter(self._last))]
                return outcome
            if outcome is not DropReason.BAD_SEAL:
                reason = outcome
        return reason

    def _in_order(self, first: _UnderKey | None) -> Iterable[_UnderKey]:
        if first is None or first is self._keys[0]:
            return self._keys
        return (first, *(under for under in self._keys if under is not first))
