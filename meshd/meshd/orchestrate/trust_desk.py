"""What a person sees of the trust in the mesh, and does about it: revoke a node, change the datagram key."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from meshd.core.decrees import DecreeKind
from meshd.core.membership import MemberView
from meshd.core.sealing import Opener
from meshd.health import TrustFacts
from meshd.orchestrate.trust_contacts import is_issuer
from meshd.shell.stream_errors import StreamError
from meshd.shell.warden import Warden
from meshd.trust.certificates import CertificateError, Role
from meshd.trust.identity_errors import IdentityError, NotAnIssuer
from meshd.trust.standing import date_text
from meshd_cms import NodeId, Store, node_id_text
from meshd_cms.types import node_id_parse
from meshd_plugins.api import BadRequest, Failed, Refused, Value

PREFIX_CHARS_MIN: Final = 4


@dataclass(frozen=True, slots=True)
class Revoking:
    """What somebody asks for.

    Attributes:
        node: a name, an id, or the beginning of one.
        reason: for people.
        keep_key: leave the datagram key as it is, which the node has.
        force: also this node itself.
        dry_run: say what would happen, and do nothing.
    """

    node: str
    reason: str = ""
    keep_key: bool = False
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class _Target:
    node: NodeId
    name: str
    role: str
    address: str


class TrustDesk:
    """Reads and changes the trust of one daemon's mesh.

    Args:
        warden: of this node.
        members: as gossip has them, this node included.
        store: the records.
        opener: knows under which key others seal.
    """

    def __init__(
        self,
        warden: Warden,
        members: Callable[[], Mapping[NodeId, MemberView]],
        store: Store,
        opener: Opener,
    ) -> None:
        self._warden = warden
        self._state = warden.state
        self._members = members
        self._store = store
        self._opener = opener

    # -- looking -----------------------------------------------------------------------------------------

    def brief(self) -> dict[str, Value]:
        """What `meshd status` says."""
        state = self._state
        identity, ring, verdict = state.identity, state.ring, state.verdict
        return {
            "role": identity.role.value,
            "certificate": "good" if verdict.is_good else verdict.code,
            "certificate_until": date_text(identity.credential.not_after_s),
            "key_generation": ring.current.generation,
            "clock_ahead_s": round(state.gate.own_offset_s(), 1),
            "revoked": len(state.decrees.revoked()),
        }

    def view(self) -> Mapping[str, Value]:
        """Everything: our certificate, the keys, the clocks, who is out, who may issue."""
        state = self._state
        identity, gate = state.identity, state.gate
        verdict, credential = state.verdict, identity.credential
        issuer = credential.issuer
        return {
            "node": node_id_text(identity.node_id),
            "role": identity.role.value,
            "is_issuer": state.is_issuer,
            "certificate": {
                "standing": verdict.standing.value,
                "why": verdict.message,
                "until": date_text(credential.not_after_s),
                "left_s": round(credential.not_after_s - gate.now_s()),
                "renews": date_text(self._warden.renews_at_s),
                "renewed_by": "the mesh's root" if issuer is None else self._label(issuer),
                "last_error": self._warden.last_error,
            },
            "keys": self._keys(),
            "clock": {
                "mesh": date_text(gate.now_s()),
                "known": gate.knows_time,
                "ahead_s": round(gate.own_offset_s(), 1),
                "far_off": {
                    self._label(node): round(ahead_s, 1) for node, ahead_s in gate.far_off().items()
                },
            },
            "issuers": list(self._issuers()),
            "revoked": self._revoked(),
        }

    def facts(self) -> TrustFacts:
        """What the checks of `meshd doctor` read."""
        state, warden = self._state, self._warden
        verdict, now_s = state.verdict, state.gate.now_s()
        wanted = state.ring.wanted
        return TrustFacts(
            left_s=state.identity.credential.not_after_s - now_s,
            renewal_overdue_s=now_s - warden.renews_at_s,
            key_generation=state.ring.current.generation,
            standing_code=verdict.code,
            standing=verdict.message,
            last_error=warden.last_error,
            wanted_generation=None if wanted is None else wanted.generation,
            clock_ahead_s=state.gate.own_offset_s(),
            issuers=tuple(self._issuers()),
        )

    def _keys(self) -> list[Value]:
        ring = self._state.ring
        sealed_with = {
            node: self._opener.key_of(node)
            for node, view in self._members().items()
            if not view.is_self and view.state.is_live
        }
        opening = ring.opening
        rows: list[Value] = []
        wanted = ring.wanted
        if wanted is not None:
            rows.append(
                {
                    "generation": wanted.generation,
                    "fingerprint": wanted.commitment.hex()[:16],
                    "state": "wanted",
                    "used_by": [],
                }
            )
        for key in ring.held():
            in_use = key.key in opening
            used_by = sorted(self._label(n) for n, each in sealed_with.items() if each == key.key)
            state = "in force" if key == ring.current else "opened" if in_use else "kept"
            rows.append(
                {
                    "generation": key.generation,
                    "fingerprint": key.fingerprint,
                    "state": state,
                    "used_by": used_by,
                }
            )
        return rows

    def _issuers(self) -> list[str]:
        state = self._state
        found = {
            node: view
            for node, view in self._members().items()
            if view.state.is_live and not view.is_self and is_issuer(self._store, node)
        }
        names = [view.name for view in found.values()]
        return sorted([*names, *([self._own_name()] if state.is_issuer else [])])

    def _revoked(self) -> list[Value]:
        decrees = self._state.decrees
        return [
            {
                "node": node_id_text(each.node),
                "name": self._name(each.node),
                "by": self._label(each.authority),
                "at": date_text(each.made_at_s),
                "reason": each.reason,
            }
            for each in decrees.all()
            if each.kind is DecreeKind.REVOCATION and each.node is not None
        ]

    # -- doing -------------------------------------------------------------------------------------------

    async def revoke(self, asked: Revoking) -> Mapping[str, Value]:
        """Shut a node out, or say what that would do; what was done, once it is in force here.

        Raises:
            Refused: `unknown_node`, `not_an_issuer`, `busy`.
            BadRequest: `ambiguous_node`, `own_node`, `already_revoked`.
            Failed: as the identity says.
        """
        target = self._find(asked.node)
        self._check_issuer()
        decrees = self._state.decrees
        if decrees.is_revoked(target.node):
            raise BadRequest(
                f"{target.name or asked.node} is revoked already", code="already_revoked"
            )
        if target.node == self._state.identity.node_id and not asked.force:
            last = " and the last issuer" if len(self._issuers()) < 2 else ""
            raise BadRequest(
                f"{asked.node} is this node itself{last}: it would stop for good. --force does it",
                code="own_node",
            )
        told: dict[str, Value] = {
            "node": node_id_text(target.node),
            "name": target.name,
            "role": target.role,
            "address": target.address,
            "rotates": not asked.keep_key,
            "done": not asked.dry_run,
        }
        if asked.dry_run:
            return told
        with _as_answers():
            generation = await self._warden.revoke(
                target.node, asked.reason, rotate=not asked.keep_key
            )
        if not decrees.is_revoked(target.node):
            raise _void()
        return {**told, "key_generation": generation}

    async def rotate(self) -> Mapping[str, Value]:
        """Put a new datagram key in force; its generation.

        Raises: as `revoke`.
        """
        self._check_issuer()
        with _as_answers():
            generation = await self._warden.rotate()
        in_force = self._state.decrees.generation
        if in_force is None or in_force.generation < generation:
            raise _void()
        return {"key_generation": generation}

    async def appoint(self, node: str) -> Mapping[str, Value]:
        """Make a member an issuer: it can invite, renew, revoke and rotate, as this node can.

        Raises:
            Refused: `unknown_node`, `not_an_issuer`; `no_record`, `not_alive`: what it takes is not known now.
            BadRequest: `ambiguous_node`, `own_node`.
            Failed: the node could not be told, or did not take it.
        """
        target = self._find(node)
        self._check_issuer()
        if target.node == self._state.identity.node_id:
            raise BadRequest("this node is an issuer already", code="own_node")
        view = self._members().get(target.node)
        if view is None or not view.state.is_live:
            raise Refused(f"{node} is not there now: it has to take its new role", code="not_alive")
        public_key = self._store.public_key(target.node)
        if public_key is None:
            raise Refused(f"the record of {node} is not here yet: try again", code="no_record")
        with _as_answers():
            try:
                await self._warden.appoint(target.node, view.address, public_key)
            except (StreamError, CertificateError) as error:
                raise Failed(
                    f"{target.name or node} did not take it: {error}", code="not_appointed"
                ) from error
        return {"node": node_id_text(target.node), "name": target.name, "role": Role.ISSUER.value}

    def _check_issuer(self) -> None:
        if self._state.is_issuer:
            return
        issuers = self._issuers()
        where = f"on {issuers[0]}" if issuers else "on an issuer; none is reachable from here now"
        raise Refused(
            f"this node is {self._state.identity.role.value} and no issuer: do it {where}",
            code="not_an_issuer",
        )

    # -- names -------------------------------------------------------------------------------------------

    def _find(self, text: str) -> _Target:
        """The node that a person means, a member now or once; or any whole id."""
        known = {each.node: (each.name, each.role.value, "") for each in self._state.roster}
        for node, view in self._members().items():
            role = known[node][1] if node in known else Role.MEMBER.value
            host, port = view.address
            known[node] = (view.name, role, f"{host}:{port}")
        found = [node for node, (name, _, _) in known.items() if name == text]
        if not found and len(text) >= PREFIX_CHARS_MIN:
            found = [node for node in known if node_id_text(node).startswith(text.lower())]
        if not found:
            try:
                found = [node_id_parse(text)]
            except ValueError:
                raise Refused(
                    f"there is no node {text!r}: `meshd peers` lists them; one that was never seen here needs "
                    "its whole id",
                    code="unknown_node",
                ) from None
        if len(found) > 1:
            ids = ", ".join(sorted(node_id_text(node) for node in found)[:4])
            raise BadRequest(f"{text!r} is several nodes: {ids}", code="ambiguous_node")
        name, role, address = known.get(found[0], ("", "unknown", ""))
        return _Target(found[0], name, role, address)

    def _name(self, node: NodeId) -> str:
        view = self._members().get(node)
        if view is not None:
            return view.name
        known = self._state.known(node)
        return "" if known is None else known.name

    def _own_name(self) -> str:
        return self._name(self._state.identity.node_id)

    def _label(self, node: NodeId) -> str:
        return self._name(node) or node_id_text(node)


def _void() -> Failed:
    return Failed("the decree does not hold: a higher authority overrules this node", code="void")


@contextmanager
def _as_answers() -> Generator[None]:
    """What an identity refuses, as the edge knows it."""
    try:
        yield
    except NotAnIssuer as error:
        raise Refused(str(error), code=error.code) from error
    except IdentityError as error:
        raise Failed(str(error), code=error.code) from error
