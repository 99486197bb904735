"""Decrees signed with a stand-in for Ed25519; the rank of an authority is what it says."""

from __future__ import annotations

from typing import cast

from tests.unit.support_cms import HashSigner, hash_verify

from meshd.core.decrees import Decree, DecreeKind, Decrees
from meshd_cms.errors import CodecError
from meshd_cms.packing import pack, unpack
from meshd_cms.types import NodeId, node_id_of


def signed(signer: HashSigner, rank: int, kind: DecreeKind, *rest: object) -> bytes:
    message = pack((int(kind), rank, *rest))
    return pack((signer.public_key, message, signer.sign(message)))


def revocation(signer: HashSigner, node: NodeId, rank: int = 1, reason: str = "lost") -> bytes:
    return signed(signer, rank, DecreeKind.REVOCATION, node, reason, 0, b"")


def generation(signer: HashSigner, number: int, rank: int = 1) -> bytes:
    return signed(signer, rank, DecreeKind.KEY_GENERATION, None, "", number, bytes(32))


def hash_verify_decree(raw: bytes) -> Decree | None:
    try:
        public_key, message, signature = cast("list[bytes]", unpack(raw))
        if not hash_verify(public_key, message, signature):
            return None
        kind, rank, node, reason, number, commitment = cast("list[object]", unpack(message))
    except (CodecError, ValueError, TypeError):
        return None
    assert isinstance(kind, int)
    assert isinstance(rank, int)
    assert isinstance(reason, str)
    assert isinstance(number, int)
    assert isinstance(commitment, bytes)
    return Decree(
        DecreeKind(kind),
        node_id_of(public_key),
        rank,
        0.0,
        raw,
        cast("NodeId | None", node),
        reason,
        number,
        commitment,
    )


def decrees(*raws: bytes) -> Decrees:
    held = Decrees(hash_verify_decree)
    assert held.load(raws) == 0
    return held
