"""Who calls, and what they may: API keys, scopes and rates for requests that come over TCP.

    Unix socket                       "local": everything; the socket's file mode says who
    TCP on loopback, without a key    "loopback": ask and read, unless `http.require_key`
    TCP with a key                    "key:NAME": what the key opens
    TCP from elsewhere without        nothing

Clients of OpenAI's API cannot do without a key, so on loopback a text that does not look like one of ours counts
as none. One that does look so is checked, wherever it comes from.

Who fails is counted by source, and told to wait after some failures. A good key is let in all the same: keys cannot
be guessed, so locking a source out would only serve to lock out those who share its address.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from meshd.edge.errors import RequestError
from meshd.edge.rates import Buckets
from meshd.edge.sources import is_loopback, source_of
from meshd.edge.targets import is_name
from meshd.trust.api_keys import KEY_PREFIX, ApiKey, ApiKeys, Denial, Scope
from meshd_naming import parse_query
from meshd_plugins.api import Privacy

FAILURES_MAX: Final = 10
"""Wrong keys from one source at once; above it 429."""
FAILURES_PERIOD_S: Final = 60.0

_OPEN_PATHS: Final = frozenset({"/healthz"})
_READ_METHODS: Final = frozenset({"GET", "HEAD"})
_ADMIN_PARTS: Final = frozenset({"leave", "trust", "invites", "keys", "config", "audit"})


@dataclass(frozen=True, slots=True)
class Access:
    """Who calls, and how far they may go."""

    principal: str  # "local", "loopback" or "key:NAME"
    scopes: frozenset[Scope]
    privacy_max: Privacy = Privacy.CLOUD
    key: ApiKey | None = None

    def require(self, model: str) -> None:
        """Raise RequestError unless this may be asked for.

        Raises:
            NamingError: it is meant as a name and is none.
        """
        if self.key is None or not self.key.models:
            return
        if not self.permits(parse_query(model).path if is_name(model) and "/" in model else model):
            raise RequestError(
                f"The key {self.key.name!r} is only for {', '.join(self.key.models)}",
                code="model_not_permitted",
                param="model",
                status=403,
            )

    def permits(self, path: str) -> bool:
        """Whether this, a name without constraints or a model's family, may be asked for."""
        return self.key is None or self.key.permits(path)


LOCAL: Final = Access("local", frozenset(Scope))
LOOPBACK: Final = Access("loopback", frozenset({Scope.ASK, Scope.READ}))
_NOBODY: Final = Access("nobody", frozenset())


class Gate:
    """Lets requests in, for one edge.

    Args:
        keys: the node's keys; None: there are none, and no key is good.
        require_key: on loopback too.
    """

    def __init__(self, keys: ApiKeys | None = None, *, require_key: bool = False) -> None:
        self._keys = keys
        self._require_key = require_key
        self._rates = Buckets()
        self._failures = Buckets()

    def enter(
        self,
        headers: Mapping[bytes, bytes],
        client: str,
        server: str,
        wanted: Scope | None,
        now_s: float,
    ) -> Access:
        """Who this is; `wanted` is what the request takes.

        Raises:
            RequestError: 401 (no key, or not a good one), 403 (it does not open that), 429 (too often).
        """
        given = _bearer(headers.get(b"authorization", b""))
        free = not self._require_key and is_loopback(client) and is_loopback(server)
        if given.startswith(KEY_PREFIX) or (given and not free):
            access = self._with_key(given, source_of(client), now_s)
        elif free:
            access = LOOPBACK
        elif wanted is None:
            access = _NOBODY
        else:
            raise RequestError(
                "An API key is needed, as Authorization: Bearer sk-meshd-...; `meshd key create NAME` on the "
                "node makes one",
                code="missing_api_key",
                status=401,
            )
        if wanted is not None and wanted not in access.scopes:
            raise _lacking(access, wanted)
        return access

    def _with_key(self, given: str, source: str, now_s: float) -> Access:
        found = Denial.WRONG if self._keys is None else self._keys.verify(given)
        if isinstance(found, Denial):
            wait_s = self._failures.take(source, FAILURES_MAX, FAILURES_PERIOD_S, now_s)
            if wait_s:
                raise RequestError(
                    "Too many wrong API keys came from your address",
                    code="too_many_failures",
                    status=429,
                    retry_after_s=math.ceil(wait_s),
                )
            raise RequestError(
                f"The API key is not good: {found.value}",
                code="expired_api_key" if found is Denial.EXPIRED else "invalid_api_key",
                status=401,
            )
        if rate := found.rate:
            wait_s = self._rates.take(found.id, rate.count, rate.period_s, now_s)
            if wait_s:
                raise RequestError(
                    f"The key {found.name!r} is for {rate} requests",
                    code="key_rate_exceeded",
                    status=429,
                    retry_after_s=math.ceil(wait_s),
                )
        return Access(f"key:{found.name}", found.scopes, found.privacy, found)


def scope_of(method: str, path: str) -> Scope | None:
    """What a request takes; None: nothing. A route that nobody thought of here takes the most."""
    if path in _OPEN_PATHS:
        return None
    if path.startswith("/v1/"):
        return Scope.ASK
    if path == "/mesh/v1/ask":
        return Scope.ASK
    if path.startswith("/mesh/v1/"):
        part = path.removeprefix("/mesh/v1/").partition("/")[0]
        return Scope.READ if method in _READ_METHODS and part not in _ADMIN_PARTS else Scope.ADMIN
    return Scope.READ


def _bearer(value: bytes) -> str:
    scheme, _, rest = value.decode("latin-1").partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else ""


def _lacking(access: Access, wanted: Scope) -> RequestError:
    if access.key is not None:
        has = ", ".join(sorted(access.scopes))
        message = f"This takes a key with the scope {wanted}; {access.key.name!r} has {has}"
    else:
        message = (
            f"Over TCP this takes an API key with the scope {wanted}; the `meshd` command on the node uses the "
            "Unix socket and needs none"
        )
    return RequestError(message, code="scope_missing", status=403)
