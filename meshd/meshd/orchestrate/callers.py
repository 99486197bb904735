"""Who asks, from hop to hop: the node where it was asked, and who asked there.

A node speaks for its own people and programs: nobody else knows who holds one of its API keys. What comes
straight from that node needs no proof beyond the TLS certificate of the connection. What another node passes on
in its name does: a *passport*, the word of the origin's own key.

Invariant: a passport is good for asking what its origin asked, and for nothing else. It names the mesh, the origin,
the principal, the semantic name that was asked for, the widest privacy class, and when it ends. So a relay can
change neither who asks nor what for, and can narrow the class and not widen it. It can change the body, which
it was given to work on.

Requests of one principal for one name and class share a passport for `SHARED_S`, so that a busy node does not sign
each. That gives a relay nothing that it lacks with one for each request: nobody remembers request ids, so until
its passport ends it could ask the same again anyhow. A passport for a principal alone would be another matter:
whoever was once asked anything could ask everything.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from meshd.core.frames import CallHeader
from meshd_cms import MeshId, NodeId, node_id_text
from meshd_cms.types import NODE_ID_BYTES, Signer, Verifier
from meshd_plugins.api import Privacy, Refused, Request

LOCAL_PRINCIPAL: Final = "local"
"""Whoever may use this node's Unix socket."""
LOOPBACK_PRINCIPAL: Final = "loopback"
"""A program on this machine that came by TCP, without a key."""
KEY_PREFIX: Final = "key:"
"""And the name of an API key."""
PRINCIPAL: Final = re.compile(r"local|loopback|key:[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

CLOCK_ERROR_S: Final = 60.0
"""A passport holds this much longer than its request: clocks of a mesh differ."""
SHARED_S: Final = 30.0
"""Further requests for the same take the same passport for so long. Up: fewer signatures, a longer end."""
LIFE_S_MAX: Final = 86_400.0 + SHARED_S + 2 * CLOCK_ERROR_S
"""What ends later than this from now was not made for a request."""
ISSUED_KEPT: Final = 256
"""Passports of our own kept to be shared."""

_DOMAIN: Final = b"meshd passport v1\0"
_TAIL: Final = struct.Struct(">QB64s")  # ends at (wall seconds), widest class, signature


id_text: Final = lru_cache(maxsize=1_024)(node_id_text)
"""`node_id_text`, which takes longer than the rest of a line about a request."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    node: NodeId  # where it was asked
    principal: str = LOCAL_PRINCIPAL  # who asked there
    passport: bytes = (
        b""  # that node's word for it; empty for those of this node, and straight from it
    )

    def __str__(self) -> str:
        """The same for every request of this caller: what fairness and logs go by."""
        return f"{id_text(self.node)}/{self.principal}"


class Passports:
    """Makes the passports of this node, and checks those of others.

    Args:
        mesh: bound into each.
        me: this node.
        signer: with its key.
        verify: checks a signature.
        key_of: the public key of a member in good standing; None for whoever is none.
        unix_s: the wall clock.
    """

    def __init__(
        self,
        mesh: MeshId,
        me: NodeId,
        signer: Signer,
        verify: Verifier,
        key_of: Callable[[NodeId], bytes | None],
        unix_s: Callable[[], float],
    ) -> None:
        self._mesh = mesh
        self._me = me
        self._signer = signer
        self._verify = verify
        self._key_of = key_of
        self._unix_s = unix_s
        self._issued: dict[tuple[str, str, Privacy], tuple[float, bytes]] = {}

    def of(self, caller: Caller, request: Request) -> bytes:
        """What goes along with a request: its own passport, or for one of this node ours."""
        if caller.node != self._me:
            return caller.passport
        key = (caller.principal, request.name, request.privacy)
        needed_s = self._unix_s() + request.deadline_s + CLOCK_ERROR_S
        ends_s, passport = self._issued.pop(key, (0.0, b""))
        if not needed_s <= ends_s <= needed_s + 2 * SHARED_S:  # or the clock was set back
            ends_s = math.ceil(needed_s + SHARED_S)
            passport = self._sign(key, ends_s)
        if len(self._issued) >= ISSUED_KEPT:
            del self._issued[next(iter(self._issued))]  # the one used longest ago
        self._issued[key] = (ends_s, passport)
        return passport

    def read(self, header: CallHeader, peer: NodeId) -> Caller:
        """Who asks, of a call that `peer` sent; its certificate is proof of who `peer` is.

        Raises:
            Refused: `caller`: it is not proven, or more is asked than the origin gave its word for.
        """
        principal = header.principal or LOCAL_PRINCIPAL
        if PRINCIPAL.fullmatch(principal) is None:
            raise _unproven("the principal is malformed")
        if header.caller in (b"", peer):
            return Caller(peer, principal, header.passport)
        if len(header.caller) != NODE_ID_BYTES:
            raise _unproven("the caller is no node")
        caller = Caller(NodeId(header.caller), principal, header.passport)
        self._check(caller, header)
        return caller

    def _sign(self, said: tuple[str, str, Privacy], ends_s: int) -> bytes:
        principal, name, privacy = said
        message = _message(self._mesh, self._me, (principal, name), int(privacy), ends_s)
        return _TAIL.pack(ends_s, int(privacy), self._signer.sign(message))

    def _check(self, caller: Caller, header: CallHeader) -> None:
        if len(header.passport) != _TAIL.size:
            raise _unproven("another node passed it on without the word of the one it came from")
        ends_s, widest, signature = _TAIL.unpack(header.passport)
        key = self._key_of(caller.node)
        if key is None:
            raise _unproven("the node where it was asked is no member in good standing here")
        said = (caller.principal, header.name)
        message = _message(self._mesh, caller.node, said, widest, ends_s)
        if not self._verify(key, message, signature):
            raise _unproven("it is not what the node where it was asked gave its word for")
        if header.privacy > widest:
            raise _unproven("its privacy class was widened on the way")
        left_s = ends_s - self._unix_s()
        if not 0.0 <= left_s <= LIFE_S_MAX:
            raise _unproven("its time is over, or a clock is far off: `meshd doctor` compares them")


def _message(
    mesh: MeshId, origin: NodeId, said: tuple[str, ...], widest: int, ends_s: int
) -> bytes:
    """What is signed: fields of fixed length first, then each text with its length in front."""
    texts = [text.encode("utf-8", "surrogatepass") for text in said]
    framed = b"".join(len(text).to_bytes(4, "big") + text for text in texts)
    return _DOMAIN + mesh + origin + ends_s.to_bytes(8, "big") + bytes((widest,)) + framed


def _unproven(why: str) -> Refused:
    return Refused(f"who asks is not proven: {why}", code="caller")
