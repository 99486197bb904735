"""Where a node lets others in: its invitations, kept on disk, its PIN, and what a joiner is given.

Invariant: a use of an invite is on disk before the joiner gets its certificate, and two joiners are never judged
at once. So a single-use token lets one key in, also when the power is cut in between: that key, and no other,
may come back for its certificate.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import trio

from meshd.core.effects import Address
from meshd.shell.envelope import FlawedFile, disclose, enclose
from meshd.shell.files import FileSystem, LocalFiles
from meshd.trust.certificates import CERTIFICATE_DAYS, Role, der
from meshd.trust.identity import Identity
from meshd.trust.identity_errors import NotAnIssuer
from meshd.trust.invites import BYTES_MAX, Invite, InviteBook, InvitesDamaged, InviteState
from meshd.trust.join_errors import JoinRefused, Refusal
from meshd.trust.join_messages import (
    INVITE_ID_BYTES,
    MEMBERS_MAX,
    ClientWelcome,
    Proof,
    Welcome,
)
from meshd.trust.join_proofs import Transcript, equal, invite_id_text
from meshd.trust.join_token import SECRET_BYTES, JoinToken, encode_token, reachable
from meshd.trust.pins import OpenPin, PinDesk
from meshd_cms import NodeId, node_id_of, node_id_short
from meshd_plugins.api import Logger

INVITES_FILE: Final = "invites"
FORMAT: Final = 1
CLIENT_HINT: Final = (
    "this node's HTTP edge is not reachable from other machines: set [http] host to an address beyond loopback, "
    "such as 0.0.0.0, and restart the daemon"
)


class CannotInvite(Exception):
    """This node cannot give out that invitation; the message says why. State: nothing was changed."""

    code = "cannot_invite"


class MeshFacts(Protocol):
    """What a joiner is given that is not in our identity, as of now."""

    def datagram_key(self) -> tuple[int, bytes]:
        """Generation and key in force."""
        ...

    def decrees(self) -> Sequence[bytes]:
        """The decrees that hold, as they travel."""
        ...

    def addresses(self) -> Sequence[Address]:
        """Where this node is reached, the best first."""
        ...

    def members(self) -> Sequence[Address]:
        """Where other nodes of the mesh are."""
        ...

    def is_revoked(self, node: NodeId) -> bool:
        """Whether a node is out."""
        ...

    def may_issue(self) -> bool:
        """Whether the authority that we issue with still holds."""
        ...


@dataclass(frozen=True, slots=True)
class ClientGrant:
    """How a client reaches the HTTP edge of this node."""

    url: str
    key: str = field(repr=False)
    fingerprint: str  # SHA-256 of the edge's certificate, hex


class ClientKeys(Protocol):
    """The API keys of this node's HTTP edge."""

    def is_reachable(self) -> bool:
        """Whether clients on other machines can reach the edge."""
        ...

    def create(self, name: str) -> ClientGrant:
        """A new key for a client of this name. Blocks: it is kept on disk. Raises OSError."""
        ...


class NoClients:
    """The `ClientKeys` of a node whose HTTP edge takes no keys."""

    def is_reachable(self) -> bool:
        """No."""
        return False

    def create(self, name: str) -> ClientGrant:
        """Never called: nobody is reachable."""
        raise AssertionError(f"a key for {name!r} where there are none")


class JoinDesk:
    """One node's invitations.

    Args:
        identity: who we are now; its certificate may be renewed.
        folder: the state folder.
        facts: what joiners are told of the mesh.
        clients: where API keys come from.
        wall: seconds since 1970, as the mesh has them.
        clock: monotonic seconds.
        days: how long the certificates last that are given.
        changed: called by `watch` when a PIN was opened or closed.
        admitted: told of everybody who was let in: id, name, role.
        log: bound logger.
    """

    def __init__(
        self,
        identity: Callable[[], Identity],
        folder: Path,
        facts: MeshFacts,
        *,
        clients: ClientKeys,
        wall: Callable[[], float],
        clock: Callable[[], float],
        log: Logger,
        days: float = CERTIFICATE_DAYS,
        changed: Callable[[], None] = lambda: None,
        admitted: Callable[[NodeId, str, str], None] = lambda _node, _name, _role: None,
        files: FileSystem | None = None,
    ) -> None:
        self._identity = identity
        self._file = folder / INVITES_FILE
        self._files: FileSystem = LocalFiles() if files is None else files
        self._facts = facts
        self._clients = clients
        self._wall = wall
        self._days = days
        self._changed = changed
        self._admitted = admitted
        self._log = log
        self._judging = trio.Lock()
        self._moved = trio.Event()  # the PIN is another one, or none
        self._clock = clock
        self._book = InviteBook()
        self._load()
        self.pins = PinDesk(clock)

    # -- for people ----------------------------------------------------------------------------------------

    async def invite(self, role: Role, uses_max: int, ttl_s: float) -> tuple[str, Invite]:
        """A new token, and what is kept of it.

        Raises:
            CannotInvite, TooManyInvites: see their messages.
            OSError: it could not be kept; it is not valid.
        """
        self._check_may_invite(role)
        addresses = self.addresses()
        if not addresses:
            raise CannotInvite(
                "this node knows no address at which others reach it: set [listen] advertise"
            )
        secret = secrets.token_bytes(SECRET_BYTES)
        async with self._judging:
            before = self._book.saved()
            invite = self._book.add(secret, role, uses_max, ttl_s, self._wall())
            await self._keep(before)
        token = JoinToken(
            mesh_id=self._identity().mesh_id,
            secret=secret,
            role=role,
            expires_at_s=int(invite.expires_at_s),
            addresses=addresses,
        )
        self._log.info("invite.made", invite=invite_id_text(invite.id), role=role.value)
        return encode_token(token), invite

    def open_pin(self, role: Role, ttl_s: float) -> OpenPin:
        """A new PIN; one that was open is void. Raises CannotInvite."""
        self._check_may_invite(role)
        opened = self.pins.open(role, ttl_s)
        self._moved.set()
        self._log.info("pin.opened", role=role.value)
        return opened

    def close_pin(self) -> bool:
        """Make the PIN void; whether there was one."""
        closed = self.pins.close()
        self._moved.set()
        return closed

    def addresses(self) -> tuple[Address, ...]:
        """Where joiners reach this node, the best first."""
        return reachable(self._facts.addresses())

    async def watch(self) -> None:
        """Tell when a PIN was opened or closed, by itself too, until cancelled."""
        while True:
            opened = self.pins.current
            left_s = math.inf if opened is None else opened.expires_at_s - self._clock()
            self._moved = trio.Event()
            with trio.move_on_after(max(0.0, left_s)):
                await self._moved.wait()
            self._changed()

    def invites(self) -> tuple[tuple[Invite, InviteState], ...]:
        """What was given out and is remembered, the latest first."""
        now_s = self._wall()
        return tuple((each, each.state(now_s)) for each in self._book.all())

    async def revoke(self, identifier: bytes) -> Invite:
        """Let nobody in any more with this invite. Raises JoinRefused, OSError."""
        async with self._judging:
            before = self._book.saved()
            revoked = self._book.revoke(identifier)
            await self._keep(before)
        self._log.info("invite.revoked", invite=invite_id_text(identifier))
        return revoked

    def _check_may_invite(self, role: Role) -> None:
        identity = self._identity()
        try:
            identity.check_may_invite(role)
        except NotAnIssuer as error:
            raise CannotInvite(str(error)) from error
        if not self._facts.may_issue():
            raise CannotInvite(
                "who made this node an issuer was revoked, and its authority with it: do it on another issuer"
            )
        if role is Role.CLIENT and not self._clients.is_reachable():
            raise CannotInvite(CLIENT_HINT)

    # -- for joiners ---------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether a joiner may get an answer."""
        return self._book.has_some() or self.pins.current is not None

    def judge_token(self, proof: Proof, transcript: Transcript) -> bytes:
        """The key that the joiner has proved to know.

        Raises:
            JoinRefused: it has not, or is unknown here.
        """
        if len(proof.invite) != INVITE_ID_BYTES:
            raise JoinRefused(Refusal.MALFORMED)
        key = self._book.find(proof.invite).key
        if not equal(transcript.joiner_mac(key), proof.mac):
            raise JoinRefused(Refusal.WRONG_SECRET)
        return key

    def judge_pin(self, pin: str, shared: bytes, mac: bytes) -> OpenPin:
        """See `PinDesk.compare`."""
        try:
            return self.pins.compare(pin, shared, mac)
        finally:
            self._moved.set()

    def judge_session(self, proof: Proof, transcript: Transcript, key: bytes) -> None:
        """Raise JoinRefused unless the proof is of the one that the PIN's key was agreed with."""
        if proof.invite or not equal(transcript.joiner_mac(key), proof.mac):
            raise JoinRefused(Refusal.WRONG_PIN)

    async def let_in(
        self, proof: Proof, transcript: Transcript, key: bytes, pin: str | None
    ) -> Welcome | ClientWelcome:
        """Use up the invite (or the PIN) and make what the joiner gets. Its proof was judged good.

        Raises:
            JoinRefused: it may not come in; nothing was used up.
        """
        if not transcript.is_signed(proof.possession):
            raise JoinRefused(Refusal.MALFORMED)
        node = node_id_of(proof.public_key)
        if self._facts.is_revoked(node):
            raise JoinRefused(Refusal.NODE_REVOKED)
        async with self._judging:
            role = self._book.find(proof.invite).role if pin is None else self.pins.required().role
            try:
                self._check_may_invite(role)
            except CannotInvite as error:
                edge = role is Role.CLIENT and self._identity().is_issuer
                raise JoinRefused(Refusal.NO_EDGE if edge else Refusal.NOT_AN_ISSUER) from error
            await self._use_up(proof, node, pin)
            welcome = await self._welcome(proof, transcript.inviter_mac(key), role)
        self._admitted(node, proof.name, role.value)
        self._log.info(
            "join.admitted",
            node=node_id_short(node),
            name=proof.name,
            role=role.value,
            by="pin" if pin is not None else invite_id_text(proof.invite),
        )
        return welcome

    async def _use_up(self, proof: Proof, node: NodeId, pin: str | None) -> None:
        if pin is not None:
            self.pins.take(pin)
            self._moved.set()
            return
        before = self._book.saved()
        self._book.take(proof.invite, node, proof.name, self._wall())
        try:
            await self._keep(before)
        except OSError as error:
            self._log.warning("invite.not_kept", error=str(error))
            raise JoinRefused(Refusal.NOT_KEPT) from error

    async def _welcome(self, proof: Proof, mac: bytes, role: Role) -> Welcome | ClientWelcome:
        identity = self._identity()
        if role is Role.CLIENT:
            return await self._client_welcome(proof, mac, identity.mesh_name)
        generation, datagram_key = self._facts.datagram_key()
        chain = identity.issue(proof.public_key, role, self._wall(), self._days)
        authority = identity.appoint(proof.public_key) if role is Role.ISSUER else ()
        return Welcome(
            mac=mac,
            mesh_name=identity.mesh_name,
            role=role,
            chain=der(chain),
            authority=der(authority),
            key_generation=generation,
            datagram_key=datagram_key,
            decrees=tuple(self._facts.decrees()),
            members=(*self._facts.addresses(), *self._facts.members())[:MEMBERS_MAX],
        )

    async def _client_welcome(self, proof: Proof, mac: bytes, mesh_name: str) -> ClientWelcome:
        try:
            grant = await trio.to_thread.run_sync(self._clients.create, proof.name or "client")
        except OSError as error:
            self._log.warning("invite.not_kept", error=str(error))
            raise JoinRefused(Refusal.NOT_KEPT) from error
        return ClientWelcome(mac, mesh_name, grant.url, grant.key, grant.fingerprint)

    # -- the disk ------------------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            data = self._files.read(self._file, BYTES_MAX + 4096)
            self._book.load(disclose(INVITES_FILE, FORMAT, data))
        except FileNotFoundError:
            return
        except (OSError, FlawedFile, InvitesDamaged) as error:
            # Nobody is let in by an invite that cannot be read: its owner makes another one.
            self._log.warning("invites.lost", error=str(error), file=str(self._file))

    async def _keep(self, before: bytes) -> None:
        """See the book onto the disk, or take the change back. Not cut short by cancelling."""
        content = enclose(INVITES_FILE, FORMAT, self._book.saved())
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(self._write, content)
            except OSError:
                self._book.load(before)
                raise

    def _write(self, content: bytes) -> None:
        beside = self._file.with_name(f"{INVITES_FILE}.new")
        try:
            self._files.write(beside, content)
            self._files.rename(beside, self._file)
        except OSError:
            with contextlib.suppress(OSError):
                self._files.remove(beside)
            raise
        self._files.sync_folder(self._file.parent)
