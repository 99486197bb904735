"""Stores with cheap or real signatures, and a network that really serialises, for the tests of meshd_cms."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meshd_cms.codec import pack_delta, unpack_delta
from meshd_cms.packing import pack, unpack
from meshd_cms.store import Store
from meshd_cms.types import Delta, Epoch, MeshId, NodeId, StoreConfig, Verifier, Version

MESH = MeshId(b"one test mesh 16")
EVERYTHING = 10**9


@dataclass(frozen=True)
class HashSigner:
    """A stand-in for Ed25519: anybody could sign, but nobody can change a signed message unseen."""

    public_key: bytes

    def sign(self, message: bytes) -> bytes:
        return hashlib.blake2b(self.public_key + message).digest()


def hash_verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    return hashlib.blake2b(public_key + message).digest() == signature


@dataclass(frozen=True)
class RealSigner:
    private: Ed25519PrivateKey

    @property
    def public_key(self) -> bytes:
        return self.private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return self.private.sign(message)


def real_signer(number: int) -> RealSigner:
    return RealSigner(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))


def real_verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class CountingVerifier:
    """Counts what a flood would cost."""

    def __init__(self, verify: Verifier = hash_verify) -> None:
        self.calls = 0
        self._verify = verify

    def __call__(self, public_key: bytes, message: bytes, signature: bytes) -> bool:
        self.calls += 1
        return self._verify(public_key, message, signature)


def signer(number: int) -> HashSigner:
    return HashSigner(hashlib.sha256(b"node %d" % number).digest())


def store(
    number: int,
    epoch: int = 1,
    verify: Verifier = hash_verify,
    config: StoreConfig | None = None,
    mesh: MeshId = MESH,
) -> Store:
    return Store(config or StoreConfig(), mesh, signer(number), Epoch(epoch), verify)


def real_store(number: int, epoch: int = 1) -> Store:
    return Store(StoreConfig(), MESH, real_signer(number), Epoch(epoch), real_verify)


def over_the_wire(delta: Delta) -> Delta:
    return unpack_delta(unpack(pack(pack_delta(delta))))


def rumour(delta: Delta | None) -> Delta:
    """A write's rumour, which must be one, as a peer gets it."""
    assert delta is not None
    return over_the_wire(delta)


def whole(one: Store, owner: NodeId) -> Delta:
    """The whole record as this store tells it."""
    return rumour(one.delta_since(owner, Version(0), EVERYTHING))
