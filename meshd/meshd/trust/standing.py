"""Whether a node may speak: its certificate judged by the mesh's clock and by what was decreed. Pure.

Invariant: who is not in good standing gets one thing at most, a new certificate. A node whose certificate has
run out, is not valid yet, or was signed under an authority that was revoked, still has its key, and the key was
let in once; a revoked node is out for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Final

from meshd.core.decrees import Decree, Decrees
from meshd.trust.certificates import Credential
from meshd_cms.types import NodeId, node_id_short

TOLERANCE_S: Final = 60.0
"""Beyond its dates a certificate is good for so long: mesh clocks of two nodes differ. Up: later expiry."""

EXPIRED: Final = "certificate_expired"
NOT_YET_VALID: Final = "certificate_not_yet_valid"
ISSUER_REVOKED: Final = "issuer_revoked"
REVOKED: Final = "revoked"

_DATE_MAX_S: Final = 253_402_300_799.0  # the end of 9999


class Standing(Enum):
    """What a node may do."""

    GOOD = "good"
    RESTRICTED = "restricted"  # renew its certificate, and nothing else
    REVOKED = "revoked"  # nothing


@dataclass(frozen=True, slots=True)
class Verdict:
    """The standing of a node, and where it is not good, why."""

    standing: Standing
    code: str = ""
    message: str = ""

    @property
    def is_good(self) -> bool:
        """Whether it is a member like any other."""
        return self.standing is Standing.GOOD


GOOD: Final = Verdict(Standing.GOOD)


def judge(
    credential: Credential, authorities: Sequence[NodeId], now_s: float, decrees: Decrees
) -> Verdict:
    """The standing of the node with this certificate.

    Args:
        credential: what its certificate says; the chain was verified.
        authorities: the nodes whose authority the chain rests on.
        now_s: by the mesh's clock, seconds since 1970.
        decrees: what holds here.
    """
    node = node_id_short(credential.node)
    out = decrees.revocation(credential.node)
    if out is not None:
        return Verdict(Standing.REVOKED, REVOKED, f"node {node} {told(out)}")
    for authority in authorities:
        out = decrees.revocation(authority)
        if out is not None:
            return Verdict(
                Standing.RESTRICTED,
                ISSUER_REVOKED,
                f"the certificate of node {node} rests on an issuer that {told(out)}: it has to be renewed by "
                "another one",
            )
    if now_s > credential.not_after_s + TOLERANCE_S:
        return Verdict(
            Standing.RESTRICTED,
            EXPIRED,
            f"the certificate of node {node} ended on {date_text(credential.not_after_s)}: it has to be renewed, "
            "which it does by itself once it reaches an issuer",
        )
    if now_s < credential.not_before_s - TOLERANCE_S:
        return Verdict(
            Standing.RESTRICTED,
            NOT_YET_VALID,
            f"the certificate of node {node} begins on {date_text(credential.not_before_s)}, and the mesh's clock "
            f"shows {date_text(now_s)}: look at the clocks with `meshd trust`",
        )
    return GOOD


def told(revocation: Decree) -> str:
    """Who revoked, when and why: completes "node X ..."."""
    why = f": {revocation.reason}" if revocation.reason else ""
    by = node_id_short(revocation.authority)
    return f"was revoked by {by} on {date_text(revocation.made_at_s)}{why}"


def date_text(time_s: float) -> str:
    """Seconds since 1970 as people read them, in UTC."""
    within_s = min(max(time_s, 0.0), _DATE_MAX_S)
    return datetime.fromtimestamp(int(within_s), UTC).strftime("%Y-%m-%d %H:%M UTC")
