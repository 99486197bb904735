"""The endpoints behind `meshd key`: make, list and revoke API keys. They take the scope admin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from meshd.edge.context import context_of
from meshd.edge.errors import RequestError
from meshd.edge.http import from_json, read_body, send_json, to_json
from meshd.trust.api_keys import (
    ApiKey,
    ApiKeyError,
    ApiKeys,
    KeyTermsError,
    KeyUse,
    NoSuchKey,
    parse_rate,
    parse_scopes,
    parse_span_s,
)
from meshd.trust.api_keys import (
    Scope as KeyScope,
)
from meshd_plugins.api import Privacy, Value

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from meshd.edge.exposure import Exposure
    from meshd.edge.limits import EdgeLimits


class KeyList:
    """`GET /mesh/v1/keys`. An ASGI application."""

    def __init__(self, exposure: Exposure | None) -> None:
        self._exposure = exposure

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        rows: list[Value] = [key_value(key, use) for key, use in _keys(self._exposure).listed()]
        await send_json(send, 200, to_json({"keys": rows}), context_of(scope).headers)


class KeyMaker:
    """`POST /mesh/v1/keys`: the only time that the key itself is shown. An ASGI application."""

    def __init__(self, exposure: Exposure | None, limits: EdgeLimits) -> None:
        self._exposure = exposure
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, once the key is on the disk."""
        limits = self._limits
        raw = await read_body(scope, receive, limits.request_bytes_max, limits.body_deadline_s)
        keys, wanted = _keys(self._exposure), from_json(raw)
        made, text = await trio.to_thread.run_sync(_make, keys, wanted)
        pin = "" if self._exposure is None else self._exposure.pin
        body = {**key_value(made, KeyUse()), "api_key": text, "http_pin": pin}
        headers = (*context_of(scope).headers, (b"cache-control", b"no-store"))
        await send_json(send, 200, to_json(body), headers)


class KeyRevoker:
    """`DELETE /mesh/v1/keys/{name}`. An ASGI application."""

    def __init__(self, exposure: Exposure | None) -> None:
        self._exposure = exposure

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request; the key is good no more, whatever the answer."""
        name = str(scope["path_params"]["name"])
        keys = _keys(self._exposure)
        gone = await trio.to_thread.run_sync(_revoke, keys, name)
        body = to_json({"revoked": gone.name, "left": len(keys)})
        await send_json(send, 200, body, context_of(scope).headers)


def key_value(key: ApiKey, use: KeyUse) -> dict[str, Value]:
    """A key as the API and `meshd key list --json` show it."""
    return {
        "name": key.name,
        "id": key.id,
        "scopes": sorted(scope.value for scope in key.scopes),
        "models": list(key.models),
        "rate": None if key.rate is None else str(key.rate),
        "privacy": key.privacy.name.lower(),
        "created_s": key.created_s,
        "expires_s": key.expires_s,
        "uses": use.count,
        "last_used_s": use.last_s or None,
    }


def create_key(keys: ApiKeys, wanted: Mapping[str, Value]) -> tuple[ApiKey, str]:
    """Make a key as a client or the command line words it; blocks.

    Raises:
        ApiKeyError: see `ApiKeys.create`; or a term that cannot be read.
    """
    scopes, models = str(wanted.get("scopes") or KeyScope.ASK.value), wanted.get("models") or ""
    expires, privacy = wanted.get("expires"), str(wanted.get("privacy") or "cloud").upper()
    if privacy not in Privacy.__members__:
        known = ", ".join(each.name.lower() for each in Privacy)
        raise KeyTermsError(f"{privacy.lower()!r} is no privacy class: there are {known}")
    return keys.create(
        str(wanted.get("name") or ""),
        scopes=parse_scopes(scopes),
        models=[part.strip() for part in str(models).split(",") if part.strip()],
        rate=parse_rate(str(wanted.get("rate") or "none")),
        privacy=Privacy[privacy],
        expires_in_s=None if expires is None else parse_span_s(str(expires)),
    )


def _make(keys: ApiKeys, wanted: Mapping[str, Value]) -> tuple[ApiKey, str]:
    known = ("name", "scopes", "models", "rate", "privacy", "expires")
    for field in wanted:
        if field not in known:
            raise RequestError(f"`{field}` is unknown; there are {', '.join(known)}", param=field)
    try:
        return create_key(keys, wanted)
    except ApiKeyError as error:
        raise _request_error(error) from error


def _revoke(keys: ApiKeys, name: str) -> ApiKey:
    try:
        return keys.revoke(name)
    except ApiKeyError as error:
        raise _request_error(error) from error


def _request_error(error: ApiKeyError) -> RequestError:
    match error:
        case NoSuchKey():
            status = 404
        case KeyTermsError():
            status = 400
        case _:  # the disk refused
            status = 500
    return RequestError(str(error), code=error.code, status=status)


def _keys(exposure: Exposure | None) -> ApiKeys:
    if exposure is None:
        raise RequestError("This edge keeps no API keys", code="no_such_key", status=404)
    return exposure.keys
