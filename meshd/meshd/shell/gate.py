"""Who may speak on the peer streams: the mesh's clock and its decrees, asked at every connection."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from meshd.core.decrees import Decrees
from meshd.core.frames import CLOCK_MAX_S
from meshd.core.messages import Proclaim
from meshd.core.wire import encode, payload_of
from meshd.trust.certificates import Credential, Role, authorities_of
from meshd.trust.identity import Identity
from meshd.trust.mesh_clock import MeshClock
from meshd.trust.standing import (
    EXPIRED,
    ISSUER_REVOKED,
    NOT_YET_VALID,
    Standing,
    Verdict,
    judge,
)
from meshd.trust.tls import PeerProof
from meshd_cms.types import NodeId

TRUST_ID = "meshd/trust"
"""Calls about certificates and keys go to this; a capability's id is NAME#DIGEST."""
RENEW = "renew"
TIME_TELLS = frozenset({EXPIRED, NOT_YET_VALID})
"""Codes of verdicts that another time would change."""
OUR_FAULT = TIME_TELLS | {ISSUER_REVOKED}
"""Codes with which a peer refuses us because of our certificate."""


def elapsed_s() -> float:
    """Seconds that only go forward, also while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


class Gate:
    """Judges peers, and learns the time from them.

    Args:
        clock: of the mesh.
        decrees: what holds here.
        wall_s: this machine's clock, seconds since 1970.
        elapsed_s: see there.

    Attributes:
        met: called with each peer whose connection comes up in good standing.
        told_off: called with the code when a peer refuses us because of our own certificate.
        told_time: called when a peer's clock is the first that can be believed.
    """

    def __init__(
        self,
        clock: MeshClock | None = None,
        decrees: Decrees | None = None,
        *,
        wall_s: Callable[[], float] = time.time,
        elapsed_s: Callable[[], float] = elapsed_s,
    ) -> None:
        self._clock = MeshClock() if clock is None else clock
        self.decrees = Decrees() if decrees is None else decrees
        self._wall_s = wall_s
        self._elapsed_s = elapsed_s
        self.met: Callable[[PeerProof], None] = lambda _proof: None
        self.told_off: Callable[[str], None] = lambda _code: None
        self.told_time: Callable[[], None] = lambda: None

    def wall_s(self) -> float:
        """What our own clock shows, as it is told to peers."""
        return min(max(self._wall_s(), 0.0), CLOCK_MAX_S)

    def now_s(self) -> float:
        """What time it is in the mesh, seconds since 1970."""
        return self._clock.now_s(self._wall_s(), self._elapsed_s())

    @property
    def knows_time(self) -> bool:
        """Whether there is a clock to believe, ours or a peer's."""
        return self._clock.is_known(self._wall_s(), self._elapsed_s())

    def own_offset_s(self) -> float:
        """By how much our own clock is ahead of the mesh's."""
        return self._clock.own_offset_s(self._wall_s(), self._elapsed_s())

    def far_off(self) -> Mapping[NodeId, float]:
        """Peers whose clocks are far off, and by how much they are ahead."""
        return self._clock.far_off(self._wall_s(), self._elapsed_s())

    def jumped_s(self) -> float:
        """By how much our own clock was set since the last call."""
        return self._clock.jumped_s(self._wall_s(), self._elapsed_s())

    def use_identity(self, identity: Identity) -> None:
        """Who we are from now on: an issuer's clock counts for more."""
        self._clock.is_issuer = identity.is_issuer

    def heard_clock(self, node: NodeId, clock_s: float, *, is_issuer: bool | None = None) -> None:
        """A peer said what its clock shows. `is_issuer`: None: as it was known to be."""
        if self.is_revoked(node):
            return
        was_known = self.knows_time
        self._clock.heard(node, clock_s, self._elapsed_s(), is_issuer=is_issuer)
        if self.knows_time and not was_known:
            self.told_time()

    def forget(self, node: NodeId) -> None:
        """A peer's clock does not count any more."""
        self._clock.forget(node)

    def is_revoked(self, node: NodeId) -> bool:
        """Whether a node is out."""
        return self.decrees.is_revoked(node)

    def farewell(self, node: NodeId) -> bytes | None:
        """The decree that a node is out, as a gossip message to it: it may have slept through its revocation."""
        revocation = self.decrees.revocation(node)
        if revocation is None:
            return None
        return payload_of([encode(Proclaim(revocation.raw, rumour=False))])

    def judge(self, proof: PeerProof) -> Verdict:
        """The standing of a peer now."""
        return self._judge(proof.credential, proof.authorities)

    def judge_own(self, identity: Identity) -> Verdict:
        """Our own standing now, as peers should see it."""
        return self._judge(identity.credential, authorities_of(identity.chain))

    def _judge(self, credential: Credential, authorities: Sequence[NodeId]) -> Verdict:
        # Where no clock of the mesh was ever set, dates say nothing: better a mesh without them than none.
        now_s = self.now_s() if self.knows_time else credential.not_before_s
        return judge(credential, authorities, now_s, self.decrees)

    def greeted(self, proof: PeerProof, clock_s: float) -> Verdict:
        """A peer said HELLO. Its clock counts when it is judged, and afterwards.

        A board that knows no time has to believe somebody; from the third clock on the most are right. The
        clock of a peer whose dates do not fit counts too: perhaps it is ours that is wrong.
        """
        node = proof.credential.node
        self.heard_clock(node, clock_s, is_issuer=proof.credential.role is Role.ISSUER)
        verdict = self.judge(proof)
        if verdict.is_good:
            self.met(proof)
        elif verdict.code not in TIME_TELLS:
            self.forget(node)
        return verdict


def is_internal(capability_id: str) -> bool:
    """Whether a call is one between daemons, and no capability's."""
    return capability_id.startswith("meshd/")


def may_ask(verdict: Verdict, capability_id: str, operation: str) -> bool:
    """Whether a peer of this standing is served such a call."""
    match verdict.standing:
        case Standing.GOOD:
            return True
        case Standing.RESTRICTED:
            return capability_id == TRUST_ID and operation == RENEW
        case Standing.REVOKED:
            return False
