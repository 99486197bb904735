"""The warden: keeps this node's certificate, keys and decrees in force, while the mesh runs and changes.

Invariants:

* A certificate is renewed before it ends, from any issuer that can be reached; an issuer renews its own.
* A key that was decreed is fetched from whoever has it; datagrams of the old one are opened until all had time.
* What was decreed is acted upon at once, kept on disk, and holds after a restart: a revoked peer is cut off, and
  a node that was revoked itself stops.

Two tasks: one keeps the time of the key ring and writes files, the other asks peers. Whatever fails there is
tried again, at growing intervals that have an end.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from meshd.core.decrees import Decree, DecreeKind
from meshd.core.effects import Address
from meshd.shell.keeper import SAVE_DEADLINE_S
from meshd.shell.stream_errors import StreamError
from meshd.shell.trust_calls import KEYS_MAX, Synced, TrustClient
from meshd.shell.trust_state import TrustState
from meshd.shell.warden_tools import Contact, Retry, Tools, deciding, renewal_s
from meshd.trust.certificates import (
    CertificateError,
    Role,
    authorities_of,
    der,
)
from meshd.trust.decree_proofs import sign_decree
from meshd.trust.identity_errors import IdentityError, NotAnIssuer
from meshd.trust.keyring import DatagramKey
from meshd.trust.mesh_clock import FAR_OFF_S
from meshd.trust.standing import Standing, date_text, told
from meshd_cms import NodeId, node_id_short
from meshd_plugins.api import Failed, Logger, Refused

LOOK_S: Final = 30.0
"""How often the date is looked at: the mesh's clock may move."""
PAUSE_S: Final = 1.0
"""After what worked: strangers' datagrams, and peers whose clocks differ, cannot keep us busy."""
PEERS_ASKED_MAX: Final = 3  # at once, to sync
ISSUERS_ASKED_MAX: Final = 16  # one after the other, to renew
STRANGERS_MAX: Final = 16  # addresses of datagrams that we could not open
KEY_BYTES: Final = 32
NOWHERE: Final = ("0.0.0.0", 0)  # noqa: S104 - a placeholder, never bound


class Warden:
    """Keeps the trust of one node in force.

    Args:
        state: what it keeps.
        tools: what it works with.
        log: bound logger.
    """

    def __init__(self, state: TrustState, tools: Tools, log: Logger) -> None:
        self.state = state
        self.last_error = ""  # of the last renewal that failed
        self._tools = tools
        self._log = log
        self._client = TrustClient(tools.streams)
        self._spread = tools.rng.random()
        self._renewing, self._syncing = Retry(), Retry()
        self._is_told_off = False
        self._wants_sync = True  # at the start: much may have been decreed since the last life
        self._is_lost = (
            True  # our key may be an old one: contact the mesh again once we have another
        )
        self._strangers: dict[Contact, None] = {}
        self._is_off = False  # our clock, as was last told
        self._far_off: frozenset[NodeId] = frozenset()  # whose clocks, too
        self._save_wake, self._ask_wake = trio.Event(), trio.Event()
        state.heard_of_more = self._heard_of_more
        state.changed_role = self._show
        state.gate.met = state.met
        state.gate.told_off = self._told_off
        state.gate.told_time = self._told_time
        self._apply_keys()

    # -- the tasks ---------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep it in force until cancelled."""
        self._renew_own()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep)
            nursery.start_soon(self._ask)
            task_status.started()

    async def _keep(self) -> None:
        """Switch keys when it is time, and write what changed."""
        while True:
            self._save_wake = trio.Event()
            if self.state.ring.advance(trio.current_time()):
                self._switched()
            await self.state.save(trio.current_time(), self._tools.run)
            due_s = min(self.state.ring.deadline_s, trio.current_time() + LOOK_S)
            with trio.CancelScope(deadline=due_s):
                await self._save_wake.wait()

    async def _ask(self) -> None:
        """Ask peers for what is missing here."""
        while True:
            self._ask_wake = trio.Event()
            self._look_at_clock()
            if self._needs_renewal:
                await self._attempt(self._renewing, self._renew)
            if self._wants_sync or self.state.ring.wanted is not None:
                await self._attempt(self._syncing, self._sync)
            with trio.CancelScope(deadline=self._next_ask_s()):
                await self._ask_wake.wait()

    def _next_ask_s(self) -> float:
        now_s = trio.current_time()
        due_s = [now_s + LOOK_S]
        if self._wants_sync or self.state.ring.wanted is not None:
            due_s.append(self._syncing.due_s)
        needs = self._needs_renewal
        due_s.append(self._renewing.due_s if needs else now_s + self._until_renewal_s)
        return max(min(due_s), now_s)

    async def _attempt(self, retry: Retry, attempt: Callable[[], Awaitable[bool]]) -> None:
        if trio.current_time() < retry.due_s:
            return
        if await attempt():
            retry.worked()
            retry.due_s = trio.current_time() + PAUSE_S
        else:
            retry.failed(trio.current_time(), self._tools.rng.random())

    async def save(self) -> None:
        """Write everything that is not on disk yet; a disk that hangs does not hold up the end."""
        with trio.move_on_after(SAVE_DEADLINE_S, shield=True):
            await self.state.save(trio.current_time(), self._tools.run, last=True)

    # -- what it is told ---------------------------------------------------------------------------------

    def decreed(self, decree: Decree) -> None:
        """Something was decreed; runs in the driver's task."""
        now_s = trio.current_time()
        if decree.node is not None:
            self._revoked(decree, decree.node, now_s)
        self.state.ring.decreed(self.state.decrees.generation, now_s)
        if decree.kind is DecreeKind.KEY_GENERATION:
            self._log.info(
                "key.decreed",
                generation=decree.generation,
                by=node_id_short(decree.authority),
                held=self.state.ring.wanted is None,
            )
            self._syncing.worked()  # a new key: ask at once
        self.state.changed(decrees=True)
        self._apply_keys()
        self._wake()

    def unsealed(self, source: Address) -> None:
        """A datagram of our mesh opens under no key of ours: one of us two missed a new one."""
        if len(self._strangers) < STRANGERS_MAX:
            self._strangers[Contact(None, source)] = None
        self._wants_sync = self._is_lost = True
        self._ask_wake.set()

    def look_for_decrees(self) -> None:
        """Decrees may have been passed over: ask peers by stream."""
        self._wants_sync = True
        self._ask_wake.set()

    def member_seen(self, node: NodeId, name: str) -> None:
        """A node is a member now; it may be the issuer that we look for."""
        self.state.seen(node, name)
        if self._needs_renewal:
            self._renewing.worked()
            self._ask_wake.set()

    def _revoked(self, decree: Decree, node: NodeId, now_s: float) -> None:
        known = self.state.known(node)
        self._log.warning(
            "node.revoked",
            node=node_id_short(node),
            name="" if known is None else known.name,
            by=node_id_short(decree.authority),
            at=date_text(decree.made_at_s),
            reason=decree.reason,
        )
        if node == self.state.identity.node_id:
            self._tools.out(
                f"this node {told(decree)}. It stops now, and cannot come back as it was: to have it in the mesh "
                f"again, move its folder identity away and run `meshd join` with a new token"
            )
            return
        self.state.ring.revoked(now_s)
        self.state.gate.forget(node)
        self._tools.witness.cut(node)
        self._tools.streams.recheck()
        if any(each == node for each in authorities_of(self.state.identity.chain)):
            self._renewing.worked()

    def _told_off(self, code: str) -> None:
        if not self._is_told_off:
            self._log.warning("certificate.refused", code=code)
        self._is_told_off = True
        self._ask_wake.set()

    def _told_time(self) -> None:
        """Only now can we know that our certificate has ended."""
        self._renewing.worked()
        self._ask_wake.set()

    def _heard_of_more(self, peer: NodeId) -> None:
        # It is connected: it asked us just now. So its address plays no part.
        if len(self._strangers) < STRANGERS_MAX:
            self._strangers[Contact(peer, NOWHERE, is_connected=True)] = None
        self._wants_sync = True
        self._ask_wake.set()

    def _wake(self) -> None:
        self._save_wake.set()
        self._ask_wake.set()

    # -- keys --------------------------------------------------------------------------------------------

    def _apply_keys(self) -> None:
        """Open first, then seal: nobody gets a datagram of ours whose answer we could not open."""
        ring = self.state.ring
        self._tools.opener.use_keys(ring.opening)
        self._tools.sealer.use_key(ring.current.key)

    def _switched(self) -> None:
        self._apply_keys()
        self.state.changed(keyring=True)
        ring = self.state.ring
        self._log.info("key.used", generation=ring.current.generation, opening=len(ring.opening))
        if self._is_lost:
            self._is_lost = False
            self._tools.rejoin()

    async def _sync(self) -> bool:
        """Ask several peers at once for decrees and keys; whether nothing is missing any more."""
        asked = self._to_sync_with()
        self._strangers.clear()
        answers: list[Synced] = []

        async def ask(contact: Contact) -> None:
            wanted = self.state.ring.wanted
            commitments = [] if wanted is None else [wanted.commitment]
            ids = self.state.decrees.ids()
            try:
                synced = await self._client.sync(contact.node, contact.address, ids, commitments)
            except (StreamError, Failed, OSError):
                return
            answers.append(synced)
            self._take(synced)

        async with trio.open_nursery() as nursery:
            for contact in asked:
                nursery.start_soon(ask, contact)
        if answers or not asked:
            self._wants_sync = False
        return self.state.ring.wanted is None and not self._wants_sync

    def _take(self, synced: Synced) -> None:
        if synced.decrees:
            self._tools.post(deciding(synced.decrees))
        for key in synced.keys[:KEYS_MAX]:
            if self.state.ring.add(key, trio.current_time()):
                self._log.info("key.fetched", generation=self.state.ring.highest)
                self.state.changed(keyring=True)
                self._apply_keys()
                self._save_wake.set()

    def _to_sync_with(self) -> list[Contact]:
        """Who decreed the key has it; then those whose datagrams told us, then anybody."""
        wanted = self.state.ring.wanted
        # Who is connected can be asked whatever is known of its address.
        connected = (
            Contact(each, NOWHERE, is_connected=True) for each in self._tools.streams.connected()
        )
        found = {each.node or each.address: each for each in (*connected, *self._tools.contacts())}
        others = list(found.values())
        self._tools.rng.shuffle(others)
        others.sort(key=lambda each: not each.is_connected)
        authority = None if wanted is None else wanted.authority
        first = [each for each in others if each.node == authority and each.node is not None]
        ordered = dict.fromkeys((*first, *self._strangers, *others))
        return list(ordered)[:PEERS_ASKED_MAX]

    # -- the certificate ---------------------------------------------------------------------------------

    @property
    def renews_at_s(self) -> float:
        """When our certificate is renewed, by the mesh's clock, if nothing else demands it."""
        return renewal_s(self.state.identity.credential, self._spread)

    @property
    def _until_renewal_s(self) -> float:
        return self.renews_at_s - self.state.gate.now_s()

    @property
    def _needs_renewal(self) -> bool:
        verdict = self.state.verdict
        if verdict.standing is Standing.REVOKED or not self.state.gate.knows_time:
            return False
        return self._is_told_off or not verdict.is_good or self._until_renewal_s <= 0.0

    async def _renew(self) -> bool:
        """Get a new certificate; whether we have one."""
        if self._renew_own():
            return True
        issuers = [each for each in self._tools.contacts() if each.is_issuer or each.node is None]
        self._tools.rng.shuffle(issuers)
        issuers.sort(key=lambda each: (not each.is_issuer, not each.is_connected))
        self.last_error = "no issuer is known: is one running, and can this node reach it?"
        for issuer in issuers[:ISSUERS_ASKED_MAX]:
            try:
                chain = await self._client.renew(issuer.node, issuer.address)
                self._use(chain)
            except (StreamError, Failed, CertificateError, IdentityError, OSError) as error:
                self.last_error = str(error)
                continue
            if not self._needs_renewal:
                return True
            self.last_error = (
                "the new certificate is not valid by the mesh's clock: look at the clocks"
            )
        self._log.warning(
            "certificate.not_renewed",
            until=date_text(self.state.identity.credential.not_after_s),
            error=self.last_error,
        )
        return False

    def _renew_own(self) -> bool:
        """An issuer is its own authority; whether it was and did."""
        state = self.state
        if not state.is_issuer or not self._needs_renewal:
            return False
        identity, days = state.identity, state.certificate_days
        now_s = state.gate.now_s()
        try:
            self._use(der(identity.issue(identity.signer.public_key, identity.role, now_s, days)))
        except (CertificateError, IdentityError) as error:
            self.last_error = str(error)
            return False
        return True

    def _use(self, chain: Sequence[bytes]) -> None:
        """Raises CertificateError, IdentityError; nothing is changed then."""
        self.state.renew(chain)
        self._show()

    def _show(self) -> None:
        """Show the certificate that we have now from now on."""
        identity = self.state.identity
        self._is_told_off, self.last_error = False, ""
        self._spread = self._tools.rng.random()
        issuer = identity.credential.issuer
        self._log.info(
            "certificate.renewed",
            until=date_text(identity.credential.not_after_s),
            role=identity.role.value,
            by="" if issuer is None else node_id_short(issuer),
        )
        self._tools.streams.use_identity(identity)
        self._tools.renewed(identity)
        self._save_wake.set()

    def _look_at_clock(self) -> None:
        gate = self.state.gate
        if jump_s := gate.jumped_s():
            self._log.warning("clock.jumped", by_s=round(jump_s, 1))
        ahead_s = gate.own_offset_s()
        is_off = gate.knows_time and abs(ahead_s) > FAR_OFF_S
        if is_off and not self._is_off:
            self._log.warning(
                "clock.off",
                ahead_s=round(ahead_s, 1),
                do="`timedatectl set-ntp true` on this machine",
            )
        self._is_off = is_off
        far_off = gate.far_off()
        for node in far_off.keys() - self._far_off:
            self._log.warning(
                "peer.clock_off", peer=node_id_short(node), ahead_s=round(far_off[node], 1)
            )
        self._far_off = frozenset(far_off)

    # -- what an issuer does for people --------------------------------------------------------------------

    async def rotate(self) -> int:
        """Put a new datagram key in force; its generation.

        Raises:
            NotAnIssuer, IdentityError: as `sign_decree`.
            Refused: `busy`.
        """
        return await self._decree((), self.state.ring.highest)

    async def appoint(self, node: NodeId, address: Address, public_key: bytes) -> None:
        """Make a member an issuer, one rank below this node.

        Raises:
            NotAnIssuer, CertificateError: as `Identity.appoint`; nothing was said to the node.
            StreamError, Failed: the node could not be told, or did not take it.
        """
        state = self.state
        self._check_issuer()
        identity, now_s = state.identity, state.gate.now_s()
        authority = identity.appoint(public_key)
        chain = identity.issue(public_key, Role.ISSUER, now_s, state.certificate_days)
        await self._client.appoint(node, address, der(chain), der(authority))
        self._log.warning("node.appointed", node=node_id_short(node))

    async def revoke(self, node: NodeId, reason: str, *, rotate: bool) -> int | None:
        """Shut a node out, and put a new key in force that it does not have; its generation.

        What an issuer decreed is void once it is out. So whom it had revoked, we revoke again first; and then, or
        if the key in force was its own, there is a new one in any case: the key that it made against those, heard
        of here or not, is void as well.

        Raises: as `rotate`.
        """
        state = self.state
        self._check_issuer()
        decreed = state.decrees.all()
        again = [
            self._revocation(each.node, each.reason)
            for each in decreed
            if each.authority == node and each.node is not None and each.node != node
        ]
        raws = (*again, self._revocation(node, reason))
        in_force = state.decrees.generation
        if not (rotate or again) and (in_force is None or in_force.authority != node):
            await self._post(raws)
            return None
        others = [each.generation for each in decreed if each.authority != node]
        return await self._decree(raws, max(others, default=0))

    def _revocation(self, node: NodeId, reason: str) -> bytes:
        return sign_decree(
            self.state.identity,
            DecreeKind.REVOCATION,
            made_at_s=self.state.gate.now_s(),
            node=node,
            reason=reason,
        )

    async def _decree(self, before: tuple[bytes, ...], highest: int) -> int:
        """A new key, one generation above the highest, on disk before anybody hears of it."""
        state = self.state
        self._check_issuer()
        made = DatagramKey(highest + 1, secrets.token_bytes(KEY_BYTES))
        raw = sign_decree(
            state.identity,
            DecreeKind.KEY_GENERATION,
            made_at_s=state.gate.now_s(),
            generation=made.generation,
            commitment=made.commitment,
        )
        state.ring.hold(made)
        state.changed(keyring=True)
        await state.save(trio.current_time(), self._tools.run)
        await self._post((*before, raw))
        return made.generation

    def _check_issuer(self) -> None:
        """Raise NotAnIssuer unless what we decree counts."""
        if not self.state.is_issuer:
            raise NotAnIssuer(
                "this node is no issuer: only issuers can revoke nodes and rotate keys"
            )

    async def _post(self, raws: tuple[bytes, ...]) -> None:
        """Return when the node core has looked at them."""
        done = trio.Event()
        if not self._tools.post(deciding(raws, done.set)):
            raise Refused("this node has no room for it now: try again", code="busy")
        await done.wait()
