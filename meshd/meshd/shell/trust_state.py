"""What this node has and knows of the trust in its mesh: its certificate, the keys, the decrees, who was known.

`load_trust` reads it from the disk; the warden (`meshd.shell.warden`) keeps it in force. This part also answers
what peers ask about it: it is the `Keeper` of their calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from meshd.core.decrees import Decrees
from meshd.shell.gate import Gate
from meshd.shell.keeper import Run
from meshd.shell.trust_files import NAME_CHARS_MAX, ROSTER_MAX, Known, TrustFiles
from meshd.trust.certificates import CertificateError, Role, authorities_of, der, parse_der
from meshd.trust.decree_proofs import decree_verifier
from meshd.trust.identity import Identity
from meshd.trust.identity_errors import IdentityError
from meshd.trust.keyring import DatagramKey, KeyRing
from meshd.trust.mesh_clock import MeshClock
from meshd.trust.standing import Verdict, told
from meshd.trust.tls import PeerProof
from meshd_cms import NodeId, node_id_short
from meshd_plugins.api import Logger, Refused

ROSTER_INTERVAL_S: Final = (
    60.0  # between two writes: who is known changes often, and nothing hangs on it
)


class NodeRevoked(Exception):
    """This node was revoked, and must not run. The message says by whom, when, why, and what to do."""

    code = "node_revoked"


@dataclass(slots=True)
class _Dirty:
    certificate: bool = False
    authority: bool = False
    keyring: bool = False
    decrees: bool = False
    roster: bool = False


class TrustState:
    """The trust of one node. Owned by the daemon's thread.

    Args:
        identity: with the certificate in force.
        files: where it is kept.
        gate: judges; holds the decrees.
        ring: the datagram keys.
        roster: who was known as a member before.
        certificate_days: how long the certificates last that we issue.
        log: bound logger.
    """

    def __init__(
        self,
        identity: Identity,
        files: TrustFiles,
        gate: Gate,
        ring: KeyRing,
        roster: Sequence[Known],
        *,
        certificate_days: float,
        log: Logger,
    ) -> None:
        self.identity = identity
        self.gate = gate
        gate.use_identity(identity)
        self.ring = ring
        self.certificate_days = certificate_days
        self.heard_of_more: Callable[[NodeId], None] = lambda _peer: None
        self.changed_role: Callable[[], None] = lambda: None
        self._files = files
        self._log = log
        self._roster = {each.node: each for each in roster}
        self._dirty = _Dirty()
        self._roster_due_s = 0.0

    # -- what there is -----------------------------------------------------------------------------------

    @property
    def decrees(self) -> Decrees:
        """What holds here; only the node core adds to it."""
        return self.gate.decrees

    @property
    def verdict(self) -> Verdict:
        """Our own standing."""
        return self.gate.judge_own(self.identity)

    @property
    def is_issuer(self) -> bool:
        """Whether this node may issue and decree: its authority rests on nobody who is out."""
        if not self.identity.is_issuer:
            return False
        return not any(map(self.gate.is_revoked, authorities_of(self.identity.authority)))

    @property
    def roster(self) -> tuple[Known, ...]:
        """Who was known as a member here."""
        return tuple(self._roster.values())

    def known(self, node: NodeId) -> Known | None:
        """What is remembered of a node."""
        return self._roster.get(node)

    def check_not_revoked(self) -> None:
        """Raise NodeRevoked if this node is out."""
        revocation = self.decrees.revocation(self.identity.node_id)
        if revocation is not None:
            raise NodeRevoked(
                f"this node {told(revocation)}. It cannot come back as it was: to have it in the mesh "
                f"{self.identity.mesh_name} again, move its folder identity away and run `meshd join` with a new token"
            )

    # -- what changes it ---------------------------------------------------------------------------------

    def met(self, proof: PeerProof) -> None:
        """A peer in good standing showed its certificate."""
        credential = proof.credential
        before = self._roster.get(credential.node)
        name = "" if before is None else before.name
        self._note(Known(credential.node, credential.role, name))

    def seen(self, node: NodeId, name: str) -> None:
        """A node is a member, as gossip has it: that says nothing of its role."""
        before = self._roster.get(node)
        role = Role.MEMBER if before is None else before.role
        self._note(Known(node, role, name[:NAME_CHARS_MAX]))

    def renew(self, chain: Sequence[bytes]) -> None:
        """Show this chain from now on.

        Raises:
            CertificateError, IdentityError: it is not one for us; nothing was changed.
        """
        self.identity = self.identity.with_chain(parse_der(chain))
        self.gate.use_identity(self.identity)
        self._dirty.certificate = True

    def appoint(self, chain: Sequence[bytes], authority: Sequence[bytes]) -> None:
        """Be an issuer from now on, and show this chain.

        Raises:
            CertificateError, IdentityError: it is not one for us; nothing was changed.
        """
        as_authority = self.identity.with_authority(parse_der(authority))
        appointed = as_authority.with_chain(parse_der(chain))
        if not appointed.is_issuer:
            raise CertificateError("the certificate does not say that this node is an issuer")
        self.identity = appointed
        self.gate.use_identity(self.identity)
        self._dirty.certificate = self._dirty.authority = True

    def changed(self, *, keyring: bool = False, decrees: bool = False) -> None:
        """These have to be written."""
        self._dirty.keyring |= keyring
        self._dirty.decrees |= decrees

    async def save(self, now_s: float, run: Run, *, last: bool = False) -> None:
        """Write what changed; what the disk refuses is tried again at the next change."""
        files, dirty = self._files, self._dirty
        hangs_on_it = (
            dirty.decrees
        )  # whom an issuer that is revoked let in, and what they are called
        if dirty.certificate:
            dirty.certificate = False
            await run(partial(files.keep_certificate, self.identity.chain))
        if dirty.authority:
            dirty.authority = False
            await run(partial(files.keep_authority, self.identity.authority))
        if dirty.keyring:
            dirty.keyring = False
            await run(partial(files.keep_keyring, self.ring.held()))
        if dirty.decrees:
            dirty.decrees = False
            await run(partial(files.keep_decrees, [each.raw for each in self.decrees.all()]))
        if dirty.roster and (last or hangs_on_it or now_s >= self._roster_due_s):
            dirty.roster = False
            self._roster_due_s = now_s + ROSTER_INTERVAL_S
            await run(partial(files.keep_roster, self.roster))

    def _note(self, known: Known) -> None:
        if self._roster.get(known.node) == known or self.gate.is_revoked(known.node):
            return
        self._roster[known.node] = known
        self._dirty.roster = True
        if len(self._roster) > ROSTER_MAX:
            del self._roster[next(iter(self._roster))]

    # -- what peers ask: the `Keeper` of their calls --------------------------------------------------------

    def renewed(self, proof: PeerProof) -> Sequence[bytes]:
        """A new chain for a peer; see `Keeper`."""
        if not self.is_issuer:
            raise Refused("this node is no issuer and renews nothing", code="not_an_issuer")
        if not self.gate.knows_time:
            raise Refused("this node does not know what time it is", code="clock_unset")
        role = self._role_of(proof)
        chain = self.identity.issue(
            proof.public_key, role, self.gate.now_s(), self.certificate_days
        )
        self._log.info(
            "certificate.issued", node=node_id_short(proof.credential.node), role=role.value
        )
        return der(chain)

    def lacking(self, ids: Sequence[bytes]) -> tuple[Sequence[bytes], bool]:
        """The decrees a peer lacks, and whether it has others; see `Keeper`."""
        theirs = set(ids)
        held = {each.id: each.raw for each in self.decrees.all()}
        return [raw for one, raw in held.items() if one not in theirs], not theirs <= held.keys()

    def keys(self, commitments: Sequence[bytes]) -> Sequence[bytes]:
        """The keys a peer asks for; see `Keeper`."""
        found = (self.ring.get(each) for each in commitments)
        return [each.key for each in found if each is not None]

    def behind(self, peer: NodeId) -> None:
        """A peer has decrees that are not here; see `Keeper`."""
        self.heard_of_more(peer)

    def appointed(
        self, proof: PeerProof, chain: Sequence[bytes], authority: Sequence[bytes]
    ) -> None:
        """A peer makes this node an issuer; see `Keeper`."""
        try:
            self.appoint(chain, authority)
        except (CertificateError, IdentityError) as error:
            raise Refused(
                f"that is no appointment of this node: {error}", code="no_authority"
            ) from error
        self._log.warning("node.appointed", by=node_id_short(proof.credential.node))
        self.changed_role()

    def _role_of(self, proof: PeerProof) -> Role:
        """The role that a renewed certificate says. Raises Refused."""
        credential = proof.credential
        if not any(map(self.gate.is_revoked, proof.authorities)):
            return credential.role
        known = self._roster.get(credential.node)
        if known is None:
            raise Refused(
                "the issuer that let this node in was revoked, and this node was not known here before: let it "
                "join anew with a token of another issuer",
                code="unknown_member",
            )
        # Who held the revoked issuer's key could have written any role. So nobody gains one by it, and an
        # issuer that it appointed is one no more until somebody appoints it again.
        return Role.OBSERVER if Role.OBSERVER in (credential.role, known.role) else Role.MEMBER


def load_trust(
    state_dir: Path,
    identity: Identity,
    *,
    certificate_days: float,
    log: Logger,
    wall_s: Callable[[], float] = time.time,
) -> TrustState:
    """What was kept; what is missing or damaged comes back from peers.

    `wall_s` is the clock of this machine, seconds since 1970.

    Raises:
        NodeRevoked: this node is out, and knows it.
    """
    files = TrustFiles(state_dir, log)
    decrees = Decrees(decree_verifier(identity.root, identity.mesh_id))
    if bad := decrees.load(files.decrees()):
        log.warning("decrees.rejected", count=bad)
    keys = [DatagramKey(identity.key_generation, identity.datagram_key), *files.keyring()]
    state = TrustState(
        _in_force(identity, files, log),
        files,
        Gate(MeshClock(), decrees, wall_s=wall_s),
        KeyRing(keys, decrees.generation),
        files.roster(),
        certificate_days=certificate_days,
        log=log,
    )
    state.check_not_revoked()
    return state


def _in_force(identity: Identity, files: TrustFiles, log: Logger) -> Identity:
    """The identity with the authority and the certificate that were given last."""
    chain, authority = files.certificate(), files.authority()
    if authority is not None:
        try:
            identity = identity.with_authority(authority)
        except CertificateError as error:
            log.warning(
                "authority.rejected", error=str(error), do="appoint this node again if need be"
            )
    if chain is None:
        return identity
    try:
        return identity.with_chain(chain)
    except (CertificateError, IdentityError) as error:
        log.warning("certificate.rejected", error=str(error), do="nothing: it is renewed")
        return identity
