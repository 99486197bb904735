"""Who may speak: dates by the mesh's clock, revoked nodes, revoked issuers."""

from __future__ import annotations

import pytest

from meshd.core.decrees import Decree, DecreeKind, Decrees
from meshd.trust.certificates import Credential, Role
from meshd.trust.standing import (
    EXPIRED,
    GOOD,
    ISSUER_REVOKED,
    NOT_YET_VALID,
    REVOKED,
    TOLERANCE_S,
    Standing,
    date_text,
    judge,
)
from meshd_cms.types import NodeId, node_id_short

NODE, ISSUER, UPPER = (NodeId(letter * 16) for letter in (b"n", b"i", b"u"))
FROM_S, UNTIL_S = 1_790_000_000.0, 1_790_604_800.0
CREDENTIAL = Credential(NODE, Role.MEMBER, ISSUER, FROM_S, UNTIL_S)


def out(node: NodeId) -> Decrees:
    decree = Decree(
        DecreeKind.REVOCATION, UPPER, 1, FROM_S, b"raw" + node, node=node, reason="lost"
    )
    decrees = Decrees(lambda _raw: decree)
    assert decrees.load([decree.raw]) == 0
    return decrees


@pytest.mark.parametrize("now_s", [FROM_S - TOLERANCE_S, FROM_S, UNTIL_S, UNTIL_S + TOLERANCE_S])
def test_within_its_dates_and_a_little_beyond_a_certificate_is_good(now_s: float) -> None:
    assert judge(CREDENTIAL, (ISSUER, UPPER), now_s, Decrees()) == GOOD


@pytest.mark.parametrize(
    ("now_s", "code"),
    [(FROM_S - TOLERANCE_S - 1.0, NOT_YET_VALID), (UNTIL_S + TOLERANCE_S + 1.0, EXPIRED)],
)
def test_beyond_its_dates_it_is_good_for_a_renewal(now_s: float, code: str) -> None:
    verdict = judge(CREDENTIAL, (ISSUER,), now_s, Decrees())
    assert (verdict.standing, verdict.code) == (Standing.RESTRICTED, code)
    assert node_id_short(NODE) in verdict.message


@pytest.mark.parametrize("authority", [ISSUER, UPPER])
def test_so_it_is_when_anybody_is_out_on_whose_authority_it_rests(authority: NodeId) -> None:
    verdict = judge(CREDENTIAL, (ISSUER, UPPER), FROM_S, out(authority))
    assert (verdict.standing, verdict.code) == (Standing.RESTRICTED, ISSUER_REVOKED)


def test_a_revoked_node_is_out_whatever_its_dates_and_it_says_who_when_and_why() -> None:
    for now_s in (0.0, FROM_S, UNTIL_S * 2):
        verdict = judge(CREDENTIAL, (ISSUER,), now_s, out(NODE))
        assert (verdict.standing, verdict.code) == (Standing.REVOKED, REVOKED)
        assert verdict.message.endswith(
            f"was revoked by {node_id_short(UPPER)} on 2026-09-21 14:13 UTC: lost"
        )


def test_any_time_can_be_told() -> None:
    assert date_text(-1.0) == "1970-01-01 00:00 UTC"
    assert date_text(2.0**40) == "9999-12-31 23:59 UTC"
