"""Ed25519: signing with this node's key, checking what others signed."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_KEYS_KEPT: Final = 1024
"""Parsed public keys kept: one a node of the largest mesh we aim at."""


class Ed25519Signer:
    """Signs as this node; the `Signer` of the capability store."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self._public_key = raw_public_key(private_key.public_key())

    @property
    def public_key(self) -> bytes:
        """The raw public key, 32 bytes."""
        return self._public_key

    def sign(self, message: bytes) -> bytes:
        """The signature, 64 bytes. Deterministic (RFC 8032)."""
        return self._private_key.sign(message)

    def __repr__(self) -> str:
        """Names the public half only."""
        return f"Ed25519Signer({self._public_key.hex()})"


def raw_public_key(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes that a node id is the hash of."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` of `message` was made with the private half of `public_key`.

    Never raises: a key or a signature of the wrong size is simply wrong.
    """
    key = _parsed(public_key)
    if key is None:
        return False
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=PUBLIC_KEYS_KEPT)
def _parsed(public_key: bytes) -> Ed25519PublicKey | None:
    try:
        return Ed25519PublicKey.from_public_bytes(public_key)
    except ValueError:
        return None
