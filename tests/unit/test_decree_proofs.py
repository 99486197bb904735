"""Decrees: a true one is read as it was made, and anything else is none, whatever it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.core.decrees import COMMITMENT_BYTES, DECREE_BYTES_MAX, Decree, DecreeKind
from meshd.trust.certificates import der, node_certificate
from meshd.trust.decree_proofs import (
    REASON_BYTES_MAX,
    SIGNATURE_BYTES,
    DecreeTooLong,
    decree_verifier,
    sign_decree,
)
from meshd.trust.identity import Identity, Role, admit, init_mesh
from meshd.trust.identity_errors import NotAnIssuer
from meshd_cms.packing import pack, unpack
from meshd_cms.types import MeshId, NodeId

NOW_S = 1_790_000_000.0
OUT = NodeId(b"o" * 16)
ANY = settings(max_examples=100, deadline=None)
REVOCATION, KEY_GENERATION = DecreeKind.REVOCATION, DecreeKind.KEY_GENERATION


@dataclasses.dataclass(frozen=True)
class World:
    """A mesh with an authority of each rank, a member, and the founder of another mesh."""

    ranks: tuple[Identity, Identity]
    member: Identity
    stranger: Identity

    def check(self, raw: bytes) -> Decree | None:
        return decree_verifier(self.ranks[0].root, self.ranks[0].mesh_id)(raw)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder: Path = tmp_path_factory.mktemp("decrees")
    first = init_mesh(folder / "first", "home")
    second = admit(first, folder / "second", role=Role.ISSUER)
    member = admit(first, folder / "member")
    return World((first, second), member, init_mesh(folder / "other", "home"))


def revocation(identity: Identity, reason: str = "lost") -> bytes:
    return sign_decree(identity, REVOCATION, made_at_s=NOW_S, node=OUT, reason=reason)


def forged(world: World, body: list[object], signer: Identity) -> bytes:
    packed = pack(body)
    message = b"meshd decree v1" + world.ranks[0].mesh_id + packed
    return packed + signer.signer.sign(message)


def body_of(raw: bytes) -> list[object]:
    body = unpack(raw[:-SIGNATURE_BYTES])
    assert isinstance(body, list)
    return cast("list[object]", body)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_decree_of_each_rank_fits_a_datagram_and_is_read_as_it_was_made(
    world: World, rank: int
) -> None:
    issuer = world.ranks[rank - 1]
    raw = revocation(issuer, "x" * 1_000)
    assert len(raw) <= DECREE_BYTES_MAX
    assert world.check(raw) == Decree(
        REVOCATION, issuer.node_id, rank, NOW_S, raw, node=OUT, reason="x" * REASON_BYTES_MAX
    )
    commitment = bytes(range(COMMITMENT_BYTES))
    raw = sign_decree(
        issuer, KEY_GENERATION, made_at_s=NOW_S, generation=2**32 - 1, commitment=commitment
    )
    assert len(raw) <= DECREE_BYTES_MAX
    assert world.check(raw) == Decree(
        KEY_GENERATION,
        issuer.node_id,
        rank,
        NOW_S,
        raw,
        generation=2**32 - 1,
        commitment=commitment,
    )


@ANY
@given(reason=st.text(max_size=200))
def test_any_reason_becomes_one_line_that_fits(world: World, reason: str) -> None:
    decree = world.check(revocation(world.ranks[1], reason))
    assert decree is not None
    assert len(decree.reason.encode()) <= REASON_BYTES_MAX
    assert decree.reason.isprintable()


def test_who_is_no_issuer_signs_nothing(world: World) -> None:
    with pytest.raises(NotAnIssuer, match="no issuer"):
        revocation(world.member)


def test_with_too_many_certificates_nothing_is_signed(world: World) -> None:
    second = world.ranks[1]
    with pytest.raises(DecreeTooLong, match="closer to the founder"):
        revocation(dataclasses.replace(second, authority=second.authority * 2))


@ANY
@given(data=st.data())
def test_no_bit_can_be_changed_and_nothing_cut_off_or_added(
    world: World, data: st.DataObject
) -> None:
    raw = revocation(world.ranks[1])
    at = data.draw(st.integers(0, len(raw) * 8 - 1))
    flipped = bytearray(raw)
    flipped[at // 8] ^= 1 << at % 8
    assert world.check(bytes(flipped)) is None
    assert world.check(raw[: data.draw(st.integers(0, len(raw) - 1))]) is None
    assert world.check(raw + data.draw(st.binary(min_size=1, max_size=20))) is None


@ANY
@given(noise=st.binary(max_size=DECREE_BYTES_MAX + 100))
def test_noise_is_no_decree(world: World, noise: bytes) -> None:
    assert world.check(noise) is None
    assert world.check(noise + bytes(SIGNATURE_BYTES)) is None


@ANY
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers(0, 2**63) | st.binary(max_size=40) | st.text("ab"),
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text("ab"), inner),
        max_leaves=12,
    )
)
def test_what_an_authority_signs_that_is_no_decree_is_none(world: World, body: object) -> None:
    packed = pack(body)
    founder = world.ranks[0]
    signature = founder.signer.sign(b"meshd decree v1" + founder.mesh_id + packed)
    assert world.check(packed + signature) is None


def test_a_decree_of_another_mesh_is_none_here_and_ours_is_none_there(world: World) -> None:
    ours, theirs = revocation(world.ranks[0]), revocation(world.stranger)
    assert world.check(theirs) is None
    there = decree_verifier(world.stranger.root, world.stranger.mesh_id)
    assert there(theirs) is not None
    assert there(ours) is None


def test_a_decree_is_bound_to_the_id_of_its_mesh(world: World) -> None:
    elsewhere = decree_verifier(world.ranks[0].root, MeshId(b"?" * 16))
    assert elsewhere(revocation(world.ranks[0])) is None


def test_a_member_cannot_decree_with_its_own_certificate(world: World) -> None:
    body = body_of(revocation(world.ranks[0]))
    body[-1] = list(der(world.member.chain))
    assert world.check(forged(world, body, world.member)) is None


def test_a_member_cannot_decree_under_the_chain_of_an_authority(world: World) -> None:
    body = body_of(revocation(world.ranks[0]))
    assert world.check(forged(world, body, world.member)) is None


def test_an_authority_of_another_root_is_none(world: World) -> None:
    body = body_of(revocation(world.ranks[0]))
    body[-1] = list(der(world.stranger.authority))
    assert world.check(forged(world, body, world.stranger)) is None


def test_a_certificate_signed_by_a_member_makes_no_authority(world: World) -> None:
    key = Ed25519PrivateKey.generate()
    member = world.member
    leaf = node_certificate(
        member.mesh_id,
        key.public_key(),
        Role.ISSUER,
        member.chain[0],
        member.private_key,
        now_s=NOW_S,
    )
    body = body_of(revocation(world.ranks[0]))
    body[-1] = list(der((leaf, *member.chain)))
    packed = pack(body)
    signature = key.sign(b"meshd decree v1" + member.mesh_id + packed)
    assert world.check(packed + signature) is None


def test_the_rank_cannot_be_changed_by_leaving_out_or_swapping_certificates(world: World) -> None:
    second = world.ranks[1]
    chain = list(der(second.authority))
    for other in (chain[:1], chain[::-1], chain[1:], [*chain, chain[-1]], []):
        body = body_of(revocation(second))
        body[-1] = other
        assert world.check(forged(world, body, second)) is None


@pytest.mark.parametrize(
    ("kind", "subject"),
    [
        (1, [b"o" * 15, ""]),
        (1, ["o" * 16, ""]),
        (1, [b"o" * 16, "a\nb"]),
        (1, [b"o" * 16, "x" * 65]),
        (1, [1, bytes(32)]),
        (2, [0, bytes(32)]),
        (2, [2**32, bytes(32)]),
        (2, [True, bytes(32)]),
        (2, [1, bytes(31)]),
        (2, [b"o" * 16, ""]),
        (3, [b"o" * 16, ""]),
        (True, [b"o" * 16, ""]),
    ],
)
def test_swapped_and_impossible_fields_are_none_though_an_authority_signed_them(
    world: World, kind: object, subject: list[object]
) -> None:
    founder = world.ranks[0]
    body = [1, kind, int(NOW_S), subject, list(der(founder.authority))]
    assert world.check(forged(world, body, founder)) is None


@pytest.mark.parametrize("made_at", [-1, 2**41, 1.5, "now", True])
def test_an_impossible_date_is_none(world: World, made_at: object) -> None:
    founder = world.ranks[0]
    body = [1, 1, made_at, [OUT, ""], list(der(founder.authority))]
    assert world.check(forged(world, body, founder)) is None
