"""What proves, on the join channel, that each side knows the secret. Keyed hashes only; nothing here does I/O.

Invariant: a proof is good for one exchange only. It covers the mesh, the certificate that the inviter showed in
this very TLS session, both nonces and the joiner's key, each side has a domain of its own, and so no proof can be
carried to another session, to another inviter, or back to where it came from. Secrets never travel.

From a token's secret come two values: the invite's id, which is said aloud, and its key, which the inviter keeps
in place of the secret. By PIN, the key is what SPAKE2 gave both sides.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.trust.join_messages import INVITE_ID_BYTES
from meshd.trust.keys import verify
from meshd_cms.types import MeshId

_ID: Final = b"meshd invite id v1\0"
_KEY: Final = b"meshd invite key v1\0"
_TRANSCRIPT: Final = b"meshd join v1\0"
_POSSESSION: Final = b"meshd join v1 possession\0"
_JOINER: Final = b"meshd join v1 joiner\0"
_INVITER: Final = b"meshd join v1 inviter\0"
_PIN_JOINER: Final = b"meshd pin v1 joiner confirms\0"
_PIN_INVITER: Final = b"meshd pin v1 inviter confirms\0"
_PIN_SESSION: Final = b"meshd pin v1 session\0"


def invite_id(secret: bytes) -> bytes:
    """What the invite with this secret is called."""
    return hashlib.sha256(_ID + secret).digest()[:INVITE_ID_BYTES]


def invite_id_text(identifier: bytes) -> str:
    """An invite's id for people: 8 characters."""
    return base64.b32encode(identifier).decode("ascii").lower()


def invite_key(secret: bytes) -> bytes:
    """What is kept in place of the secret, and keys the proofs."""
    return hashlib.sha256(_KEY + secret).digest()


def certificate_hash(certificate: bytes) -> bytes:
    """SHA-256 of a certificate's DER."""
    return hashlib.sha256(certificate).digest()


@dataclass(frozen=True, slots=True)
class Transcript:
    """What both sides have said so far, and over which connection."""

    mesh_id: MeshId
    certificate: bytes  # `certificate_hash` of the one that the inviter showed in the TLS handshake
    inviter_nonce: bytes
    joiner_nonce: bytes
    public_key: bytes  # the joiner's
    name: str

    def _bytes(self) -> bytes:
        """All but the name have one length each."""
        return b"".join(
            (
                _TRANSCRIPT,
                self.mesh_id,
                self.certificate,
                self.inviter_nonce,
                self.joiner_nonce,
                self.public_key,
                self.name.encode("utf-8"),
            )
        )

    def joiner_mac(self, key: bytes) -> bytes:
        """The joiner knows the key."""
        return _mac(key, _JOINER + self._bytes())

    def inviter_mac(self, key: bytes) -> bytes:
        """The inviter knows the key."""
        return _mac(key, _INVITER + self._bytes())

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """The joiner holds the private half of its key."""
        return key.sign(_POSSESSION + self._bytes())

    def is_signed(self, possession: bytes) -> bool:
        """Whether `possession` is what `sign` gives."""
        return verify(self.public_key, _POSSESSION + self._bytes(), possession)


def pin_joiner_mac(shared: bytes) -> bytes:
    """The joiner has this key out of SPAKE2."""
    return _mac(shared, _PIN_JOINER)


def pin_inviter_mac(shared: bytes, root: bytes, role: str) -> bytes:
    """The inviter has it too, and is of the mesh with this root (DER)."""
    return _mac(shared, _PIN_INVITER + hashlib.sha256(root).digest() + role.encode("ascii"))


def pin_session_key(shared: bytes) -> bytes:
    """What keys the proofs after that."""
    return _mac(shared, _PIN_SESSION)


def equal(one: bytes, other: bytes) -> bool:
    """Whether two proofs are the same, in a time that tells nothing."""
    return hmac.compare_digest(one, other)


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")
