"""The endpoints behind `meshd invite`: make, list and revoke invitations. They take the scope admin."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.routing import Route

from meshd.edge.context import context_of
from meshd.edge.errors import RequestError
from meshd.edge.http import from_json, read_body, send_json, to_json
from meshd.shell.joining_desk import CannotInvite, ClientGrant, JoinDesk
from meshd.trust.api_keys import ApiKeyError
from meshd.trust.certificates import Role
from meshd.trust.invites import TTL_MAX_S, USES_MAX, Invite, InviteState, TooManyInvites
from meshd.trust.join_errors import JoinRefused
from meshd.trust.join_proofs import invite_id_text
from meshd.trust.pins import PIN_TTL_MAX_S, PIN_TTL_S, pin_text
from meshd_cms import node_id_text

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from meshd.core.effects import Address
    from meshd.edge.exposure import Exposure
    from meshd.edge.limits import EdgeLimits
    from meshd_plugins.api import Value

TTL_S: Final = 600.0
_KNOWN: Final = ("role", "uses", "ttl_s", "pin")
_NO_STORE: Final = (b"cache-control", b"no-store")


def invite_routes(desk: JoinDesk, limits: EdgeLimits) -> Sequence[Route]:
    """What the application serves of the desk."""
    return (
        Route("/mesh/v1/invites", InviteList(desk), methods=["GET"]),
        Route("/mesh/v1/invites", InviteMaker(desk, limits), methods=["POST"]),
        Route("/mesh/v1/invites/{id}", InviteRevoker(desk), methods=["DELETE"]),
    )


class InviteList:
    """`GET /mesh/v1/invites`. An ASGI application."""

    def __init__(self, desk: JoinDesk) -> None:
        self._desk = desk

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        rows: list[Value] = [_invite_value(*each) for each in self._desk.invites()]
        current = self._desk.pins.current
        # The PIN itself is for the person who asked for it.
        pin: Value = None
        if current is not None:
            pin = {"role": current.role.value, "attempts_left": current.attempts_left}
        body = to_json({"invites": rows, "pin": pin})
        await send_json(send, 200, body, context_of(scope).headers)


class InviteMaker:
    """`POST /mesh/v1/invites`: the only time that the token is shown. An ASGI application."""

    def __init__(self, desk: JoinDesk, limits: EdgeLimits) -> None:
        self._desk = desk
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, once the invitation is on the disk."""
        limits = self._limits
        wanted = from_json(
            await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        )
        for field in wanted:
            if field not in _KNOWN:
                raise RequestError(
                    f"`{field}` is unknown; there are {', '.join(_KNOWN)}", param=field
                )
        role, is_pin = _role(wanted), wanted.get("pin", False)
        if not isinstance(is_pin, bool):
            raise RequestError("`pin` must be true or false", param="pin")
        try:
            made = self._pin(role, wanted) if is_pin else await self._token(role, wanted)
        except CannotInvite as error:
            raise RequestError(str(error), code=error.code, status=403) from error
        except TooManyInvites as error:
            raise RequestError(str(error), code=error.code, status=429) from error
        except OSError as error:
            raise RequestError(_not_kept(error), code="disk_refuses", status=503) from error
        headers = (*context_of(scope).headers, _NO_STORE)
        await send_json(send, 200, to_json(made), headers)

    async def _token(self, role: Role, wanted: Mapping[str, Value]) -> dict[str, Value]:
        uses = wanted.get("uses", 1)
        if type(uses) is not int or not 1 <= uses <= USES_MAX:
            raise RequestError(f"`uses` must be from 1 to {USES_MAX}", param="uses")
        ttl_s = _ttl_s(wanted, TTL_S, TTL_MAX_S)
        token, invite = await self._desk.invite(role, uses, ttl_s)
        return {"token": token, "ttl_s": ttl_s, **_invite_value(invite, InviteState.OPEN)}

    def _pin(self, role: Role, wanted: Mapping[str, Value]) -> dict[str, Value]:
        if wanted.get("uses", 1) != 1:
            raise RequestError("a PIN is for one device: leave out `uses`", param="uses")
        ttl_s = _ttl_s(wanted, PIN_TTL_S, PIN_TTL_MAX_S)
        opened = self._desk.open_pin(role, ttl_s)
        return {
            "pin": pin_text(opened.pin),
            "role": role.value,
            "ttl_s": ttl_s,
            "attempts": opened.attempts_left,
            "addresses": [list(address) for address in self._desk.addresses()],
        }


class InviteRevoker:
    """`DELETE /mesh/v1/invites/{id}`; the id `pin` is the PIN's. An ASGI application."""

    def __init__(self, desk: JoinDesk) -> None:
        self._desk = desk

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request; nobody is let in with it any more."""
        text = str(scope["path_params"]["id"])
        if text == "pin":
            if not self._desk.close_pin():
                raise _no_such("no PIN is shown now")
            revoked: dict[str, Value] = {"id": "pin", "state": InviteState.REVOKED.value}
        else:
            revoked = _invite_value(await self._revoked(text), InviteState.REVOKED)
        await send_json(send, 200, to_json(revoked), context_of(scope).headers)

    async def _revoked(self, text: str) -> Invite:
        try:
            return await self._desk.revoke(base64.b32decode(text.upper()))
        except (binascii.Error, ValueError, JoinRefused) as error:
            raise _no_such(
                f"there is no invitation {text!r}: `meshd invite list` shows them"
            ) from error
        except OSError as error:
            raise RequestError(_not_kept(error), code="disk_refuses", status=503) from error


def _no_such(message: str) -> RequestError:
    return RequestError(message, code="no_such_invite", status=404)


def _not_kept(error: OSError) -> str:
    return f"the disk refuses ({error.strerror or error}), so nothing was changed: free some space"


def _role(wanted: Mapping[str, Value]) -> Role:
    try:
        return Role(str(wanted.get("role", Role.MEMBER.value)))
    except ValueError as error:
        raise RequestError(f"`role` must be one of {', '.join(Role)}", param="role") from error


def _ttl_s(wanted: Mapping[str, Value], default_s: float, most_s: float) -> float:
    ttl_s = wanted.get("ttl_s", default_s)
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not 1 <= ttl_s <= most_s:
        raise RequestError(f"`ttl_s` must be from 1 to {most_s:g} seconds", param="ttl_s")
    return float(ttl_s)


def _invite_value(invite: Invite, state: InviteState) -> dict[str, Value]:
    return {
        "id": invite_id_text(invite.id),
        "role": invite.role.value,
        "state": state.value,
        "made_at_s": invite.made_at_s,
        "expires_at_s": invite.expires_at_s,
        "uses_max": invite.uses_max,
        "uses": [
            {"node": node_id_text(use.node), "name": use.name, "at_s": use.at_s}
            for use in invite.uses
        ],
    }


@dataclass(frozen=True, slots=True)
class EdgeClients:
    """The API keys that clients get who join with a token: the `ClientKeys` of the desk.

    Attributes:
        exposure: keys and certificate of the edge.
        address: where others reach it, now.
    """

    exposure: Exposure
    address: Callable[[], Address]

    def is_reachable(self) -> bool:
        """Whether the edge listens beyond loopback."""
        return self.exposure.certificate is not None

    def create(self, name: str) -> ClientGrant:
        """A key of its own for each, named after it. Blocks; raises OSError."""
        plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:40].strip("-") or "client"
        try:
            _, key = self.exposure.keys.create(f"{plain}-{secrets.token_hex(3)}")
        except ApiKeyError as error:
            raise OSError(str(error)) from error
        host, port = self.address()
        at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return ClientGrant(f"https://{at}", key, self.exposure.pin)
