"""What the warden works with: whom it may ask, when it tries again, and the parts of the node it drives."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from meshd.core.effects import Address, Effect
from meshd.core.node import NodeCore
from meshd.core.sealing import Opener, Sealer
from meshd.shell.driver import Command
from meshd.shell.keeper import Run, in_thread
from meshd.shell.streams import PeerStreams
from meshd.shell.witness import WitnessStreams
from meshd.trust.certificates import BACKDATED_S, Credential
from meshd.trust.identity import Identity
from meshd_cms import NodeId

RENEW_AT: Final = 1 / 3
"""Of a certificate's life; a little more, drawn at random, so that not all of a mesh come at once. Up: fewer
renewals, and less time in which the mesh bears that no issuer is there."""
RENEW_SPREAD: Final = 0.1
RETRY_FIRST_S: Final = 0.5
RETRY_MAX_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Contact:
    """Somebody who may be asked."""

    node: NodeId | None  # None: whoever of the mesh is there
    address: Address
    is_issuer: bool = False
    is_connected: bool = False


@dataclass(slots=True)
class Retry:
    """When something may be tried again, and how patient we have become."""

    due_s: float = 0.0
    pause_s: float = RETRY_FIRST_S

    def failed(self, now_s: float, jitter: float) -> None:
        """Wait a little, and twice as long the next time; `jitter` is from 0 to 1."""
        self.due_s = now_s + self.pause_s * (0.5 + jitter)
        self.pause_s = min(2 * self.pause_s, RETRY_MAX_S)

    def worked(self) -> None:
        """Try at once when it is needed again."""
        self.due_s, self.pause_s = 0.0, RETRY_FIRST_S


@dataclass(slots=True)
class Tools:
    """What the warden works with.

    Attributes:
        streams: to the peers.
        witness: the witness streams.
        sealer: seals our datagrams.
        opener: opens those of others.
        post: runs a command in the node core; False when there is no room.
        contacts: who may be asked, in any order.
        rejoin: contact the mesh again, now that we have its key.
        renewed: told of the identity with a new certificate.
        out: told why, when this node was revoked: it has to stop.
        run: where calls that block are made.
    """

    streams: PeerStreams
    witness: WitnessStreams
    sealer: Sealer
    opener: Opener
    post: Callable[[Command], bool]
    contacts: Callable[[], Sequence[Contact]]
    rejoin: Callable[[], None]
    renewed: Callable[[Identity], None]
    out: Callable[[str], None]
    run: Run = in_thread
    rng: random.Random = field(default_factory=lambda: random.Random(secrets.randbits(64)))


def deciding(raws: tuple[bytes, ...], done: Callable[[], None] = lambda: None) -> Command:
    """Have the node core take decrees, in this order."""

    def decree(core: NodeCore, now_s: float) -> tuple[Effect, ...]:
        effects = tuple(effect for raw in raws for effect in core.decree(raw, now_s))
        done()
        return effects

    return decree


def renewal_s(credential: Credential, spread: float) -> float:
    """When a certificate is to be renewed, seconds since 1970; `spread` is from 0 to 1."""
    issued_s = credential.not_before_s + BACKDATED_S
    life_s = credential.not_after_s - issued_s
    return issued_s + life_s * (RENEW_AT + RENEW_SPREAD * spread)
