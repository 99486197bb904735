"""API keys: who may use a node's HTTP interface from outside, how far, and until when.

A key is `sk-meshd-<id>-<secret>`, shown once. The id names the record; the secret is 160 random bits, and what
is kept of it is its SHA-256. Nothing slower is of use (decision 0023): a guess costs an attacker who has the
file 2**159 hashes, however fast each is, while a slow hash would let anybody keep this node busy with noise.

`<state_dir>/edge/api-keys`, mode 0600, is replaced as a whole: a line with the SHA-256 of the rest, then JSON. A
file that is not as it was written is set aside, and no key is good until new ones are made: a flipped bit
never widens a key.

Invariant: a key that was revoked is not good in this process from that moment, and not in a later one unless
the disk refused, which `revoke` then says.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from threading import Lock
from typing import Final, cast

from meshd.trust.private_files import alone_in, read_private, replace_private
from meshd_plugins.api import Privacy

FORMAT: Final = 1
KEY_PREFIX: Final = "sk-meshd-"
KEYS_MAX: Final = 256
MODELS_MAX: Final = 16
"""Patterns of one key."""

_ID_BYTES: Final = 5
_ID_CHARS: Final = 8
_SECRET_BYTES: Final = 20
_SECRET_CHARS: Final = 32
_FILE_BYTES_MAX: Final = 1 << 20
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PATTERN: Final = re.compile(r"[A-Za-z0-9._/*:+-]{1,128}")
_RATE: Final = re.compile(r"([0-9]{1,6})/(s|sec|second|min|minute|h|hour|d|day)")
_SPAN: Final = re.compile(r"([0-9]{1,5})(m|h|d|w|y)")
_PERIODS_S: Final[Mapping[str, int]] = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SPANS_S: Final[Mapping[str, int]] = {
    "m": 60,
    "h": 3600,
    "d": 86_400,
    "w": 604_800,
    "y": 31_536_000,
}


class ApiKeyError(Exception):
    """A key cannot be made or revoked. The message says what to do; nothing was changed unless it says so."""

    code = "api_key_error"


class NoSuchKey(ApiKeyError):
    """There is no key of that name."""

    code = "no_such_key"


class KeyTermsError(ApiKeyError):
    """A name, scope, pattern, rate or time that cannot be one, or one key too many."""

    code = "key_terms"


class Scope(StrEnum):
    """What a key opens. None of them contains another."""

    ASK = "ask"  # ask the mesh, and list what may be asked
    READ = "read"  # look at the node and its mesh: status, members, store, metrics
    ADMIN = "admin"  # change things: leave, trust, invites, keys; and see the configuration


class Denial(Enum):
    """Why a key is not good; the value is for people."""

    WRONG = "it is not one of this node's, or was revoked"
    EXPIRED = "it has expired"


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests in so many seconds; as many may come at once."""

    count: int  # >= 1
    period_s: int

    def __str__(self) -> str:
        """As `parse_rate` reads it."""
        return f"{self.count}/{ {1: 's', 60: 'min', 3600: 'hour', 86_400: 'day'}[self.period_s] }"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key, which is not the key."""

    id: str
    name: str
    digest: bytes = field(repr=False)  # SHA-256 of the secret
    scopes: frozenset[Scope]
    models: tuple[str, ...] = ()  # patterns of what may be asked for; none: anything
    rate: Rate | None = None
    privacy: Privacy = Privacy.CLOUD  # the farthest that its requests may travel
    created_s: int = 0  # unix time
    expires_s: int | None = None  # unix time

    def permits(self, path: str) -> bool:
        """Whether this may be asked for: `auto`, a name without constraints, or a model's family.

        Of a name with wildcards everything that it stands for must be permitted.
        """
        if not self.models:
            return True
        paths = (path, path[:-3]) if path.endswith("/**") else (path,)
        return any(all(_matches(pattern, each) for each in paths) for pattern in self.models)


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What became of a key so far."""

    count: int = 0
    last_s: int = 0  # unix time; 0: never


class ApiKeys:
    """The keys of one node. Calls may come from several threads; those that write block.

    Args:
        state_dir: of the node. A file that cannot be read stands for no keys, and `damage` says why.
        unix_s: the wall clock. It counts as no earlier than the newest time in the file, so that a board
            that boots in the past does not take an expired key for a good one.
    """

    def __init__(self, state_dir: Path, unix_s: Callable[[], float] = time.time) -> None:
        self._path = state_dir / "edge" / "api-keys"
        self._clock = unix_s
        self._lock = Lock()
        self._keys: dict[str, ApiKey] = {}
        self._uses: dict[str, KeyUse] = {}
        self._unsaved = False
        self._earliest_s = 0.0
        self.damage = ""
        self._take_over(self._read())

    def __len__(self) -> int:
        """How many there are, expired ones included."""
        return len(self._keys)

    def listed(self) -> tuple[tuple[ApiKey, KeyUse], ...]:
        """All keys by name, with their use."""
        keys = sorted(self._keys.values(), key=lambda key: key.name)
        return tuple((key, self._uses.get(key.id, KeyUse())) for key in keys)

    def verify(self, text: str) -> ApiKey | Denial:
        """The key that this is, or why it is none. Its use is counted.

        As long for an unknown id as for a wrong secret: ids are no secret, and which exist need not be told.
        """
        identifier, secret = _parts(text)
        key = self._keys.get(identifier)
        digest = hashlib.sha256(secret.encode()).digest()
        if not hmac.compare_digest(key.digest if key else _NOBODY, digest) or key is None:
            return Denial.WRONG
        now_s = self._now_s()
        if key.expires_s is not None and now_s >= key.expires_s:
            return Denial.EXPIRED
        use = self._uses.get(identifier, KeyUse())
        self._uses[identifier] = KeyUse(use.count + 1, int(now_s))
        self._unsaved = True
        return key

    def create(
        self,
        name: str,
        *,
        scopes: frozenset[Scope] = frozenset({Scope.ASK}),
        models: Sequence[str] = (),
        rate: Rate | None = None,
        privacy: Privacy = Privacy.CLOUD,
        expires_in_s: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key; what is known of it, and the key itself, which nobody can show again.

        Raises:
            KeyTermsError: the name is taken or cannot be one, no scope, a pattern that cannot be one; or
                there are too many keys.
            ApiKeyError: the disk refused; there is no such key.
        """
        _check_terms(name, scopes, models)
        identifier, secret = _random_text(_ID_BYTES), _random_text(_SECRET_BYTES)
        now_s = int(self._now_s())
        key = ApiKey(
            id=identifier,
            name=name,
            digest=hashlib.sha256(secret.encode()).digest(),
            scopes=scopes,
            models=tuple(models),
            rate=rate,
            privacy=privacy,
            created_s=now_s,
            expires_s=None if expires_in_s is None else now_s + expires_in_s,
        )
        with self._lock:
            try:
                with alone_in(self._path.parent):
                    self._take_over(self._read())
                    if any(other.name == name for other in self._keys.values()):
                        raise KeyTermsError(
                            f"there is a key {name!r}: revoke it first (`meshd key revoke {name}`), or take "
                            "another name"
                        )
                    if len(self._keys) >= KEYS_MAX:
                        raise KeyTermsError(
                            f"there are {KEYS_MAX} keys: revoke some that nobody uses"
                        )
                    self._write({**self._keys, identifier: key})
            except OSError as error:
                raise ApiKeyError(f"the key was not made: {self._refusal(error)}") from error
            self._keys = {**self._keys, identifier: key}
        return key, f"{KEY_PREFIX}{identifier}-{secret}"

    def revoke(self, name: str) -> ApiKey:
        """Make a key good no more; what it was.

        Raises:
            NoSuchKey: there is none of that name.
            ApiKeyError: the disk refused: it is revoked here and now, and would be back after a restart.
        """
        gone: ApiKey | None = None
        with self._lock:
            try:
                with alone_in(self._path.parent):
                    self._take_over(self._read())
                    gone = self._forget(name)
                    self._write(self._keys)
            except OSError as error:
                if gone is None:
                    self._forget(name)
                raise ApiKeyError(
                    f"{name} is revoked until this node restarts, and would be good again then: "
                    f"{self._refusal(error)}"
                ) from error
        return gone

    def save_uses(self) -> bool:
        """Write what use was made of the keys, if any was; False when the disk refused: try again later."""
        if not self._unsaved:
            return True
        with self._lock:
            self._unsaved = False
            try:
                with alone_in(self._path.parent):
                    self._take_over(self._read())
                    self._write(self._keys)
            except OSError:
                self._unsaved = True
                return False
        return True

    def _now_s(self) -> float:
        return max(self._clock(), self._earliest_s)

    def _forget(self, name: str) -> ApiKey:
        found = [key for key in self._keys.values() if key.name == name]
        if not found:
            known = ", ".join(sorted(key.name for key in self._keys.values())[:8]) or "none"
            raise NoSuchKey(f"there is no key {name!r}; there are: {known}")
        self._keys = {i: key for i, key in self._keys.items() if key.name != name}
        return found[0]

    def _read(self) -> dict[str, tuple[ApiKey, KeyUse]] | None:
        """What the file holds; None if there is one and it cannot be believed, which `damage` then says."""
        try:
            raw = read_private(self._path, _FILE_BYTES_MAX)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self.damage = self._refusal(error)
            return None
        try:
            return _decoded(raw)
        except (ValueError, KeyError, TypeError):
            aside = self._path.with_name(f"{self._path.name}.damaged")
            self.damage = (
                f"{self._path} is not as it was written and was moved to {aside}: no API key is good; make "
                "new ones with `meshd key create`"
            )
            try:
                self._path.rename(aside)
            except OSError as error:
                self.damage += f" (it could not be moved: {error.strerror})"
            return None

    def _take_over(self, found: dict[str, tuple[ApiKey, KeyUse]] | None) -> None:
        """Know what the file holds. One that became unreadable meanwhile takes no key away from us."""
        if found is None:
            return
        for identifier, (_, use) in found.items():
            ours = self._uses.get(identifier)
            if ours is None or ours.count < use.count:
                self._uses[identifier] = use
        self._keys = {identifier: key for identifier, (key, _) in found.items()}
        times = [max(key.created_s, use.last_s) for key, use in found.values()]
        self._earliest_s = max([self._earliest_s, *map(float, times)])

    def _write(self, keys: Mapping[str, ApiKey]) -> None:
        rows = [_plain(key, self._uses.get(key.id, KeyUse())) for key in keys.values()]
        body = json.dumps({"format": FORMAT, "keys": rows}, indent=1).encode() + b"\n"
        replace_private(self._path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)

    def _refusal(self, error: OSError) -> str:
        return f"{self._path}: {error.strerror or error}; see that meshd's user may write there"


def parse_rate(text: str) -> Rate | None:
    """`60/min`, `5/s`, `1000/day`; `none` for no limit.

    Raises:
        KeyTermsError: it is none of these.
    """
    if text == "none":
        return None
    found = _RATE.fullmatch(text)
    if not found or int(found[1]) == 0:
        raise KeyTermsError(f"{text!r} is no rate: such as 60/min, 5/s, 1000/day, or none")
    return Rate(int(found[1]), _PERIODS_S[found[2][0]])


def parse_span_s(text: str) -> int:
    """Seconds in `30m`, `12h`, `90d`, `4w` or `1y`.

    Raises:
        KeyTermsError: it is none of these.
    """
    found = _SPAN.fullmatch(text)
    if not found or int(found[1]) == 0:
        raise KeyTermsError(f"{text!r} is no time: such as 12h, 90d or 1y")
    return int(found[1]) * _SPANS_S[found[2]]


def parse_scopes(text: str) -> frozenset[Scope]:
    """`ask,read`.

    Raises:
        KeyTermsError: a word that is no scope, or none at all.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    known = {scope.value: scope for scope in Scope}
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        raise KeyTermsError(
            f"{unknown[0] if unknown else text!r} is no scope: there are {', '.join(known)}"
        )
    return frozenset(known[word] for word in words)


def _check_terms(name: str, scopes: frozenset[Scope], models: Sequence[str]) -> None:
    if not _NAME.fullmatch(name):
        raise KeyTermsError(
            f"{name!r} cannot be the name of a key: take 1 to 63 of a-z, 0-9 and '-', not at either end"
        )
    if not scopes:
        raise KeyTermsError(f"a key needs a scope: {', '.join(Scope)}")
    if len(models) > MODELS_MAX:
        raise KeyTermsError(f"a key takes {MODELS_MAX} patterns at most")
    for pattern in models:
        if not _PATTERN.fullmatch(pattern):
            raise KeyTermsError(
                f"{pattern!r} is no pattern: such as knowledge.gpt/**, SmolLM2-135M-Instruct or auto"
            )


def _matches(pattern: str, path: str) -> bool:
    """`*` stands for anything, and a last `/**` for nothing too. A wildcard in `path` takes one in `pattern`."""
    if pattern.endswith("/**") and path == pattern[:-3]:
        return True
    return fnmatch.fnmatchcase(path, pattern)


def _parts(text: str) -> tuple[str, str]:
    """Id and secret; of what is no key, two texts that fit none."""
    identifier, _, secret = text.removeprefix(KEY_PREFIX).partition("-")
    formed = text.startswith(KEY_PREFIX) and len(identifier) == _ID_CHARS
    if not formed or len(secret) != _SECRET_CHARS:
        return "", ""
    return identifier, secret


def _random_text(count: int) -> str:
    """That many random bytes, a multiple of five, in lower-case base32."""
    return base64.b32encode(secrets.token_bytes(count)).decode().lower()


_NOBODY: Final = hashlib.sha256(secrets.token_bytes(_SECRET_BYTES)).digest()


def _plain(key: ApiKey, use: KeyUse) -> dict[str, object]:
    return {
        "id": key.id,
        "name": key.name,
        "sha256": key.digest.hex(),
        "scopes": sorted(key.scopes),
        "models": list(key.models),
        "rate": "none" if key.rate is None else str(key.rate),
        "privacy": key.privacy.name.lower(),
        "created_s": key.created_s,
        "expires_s": key.expires_s,
        "uses": use.count,
        "last_used_s": use.last_s,
    }


def _decoded(raw: bytes) -> dict[str, tuple[ApiKey, KeyUse]]:
    """What `_write` wrote; ValueError, KeyError or TypeError for anything else."""
    digest, _, body = raw.partition(b"\n")
    if not hmac.compare_digest(digest, hashlib.sha256(body).hexdigest().encode()):
        raise ValueError("its sum does not fit")
    document = cast("Mapping[str, object]", json.loads(body))
    if document["format"] != FORMAT:
        raise ValueError("another format")
    rows = [_row(row) for row in cast("list[Mapping[str, object]]", document["keys"])]
    return {key.id: (key, use) for key, use in rows}


def _row(row: Mapping[str, object]) -> tuple[ApiKey, KeyUse]:
    expires_s = row["expires_s"]
    key = ApiKey(
        id=str(row["id"]),
        name=str(row["name"]),
        digest=bytes.fromhex(str(row["sha256"])),
        scopes=frozenset(Scope(str(scope)) for scope in cast("list[object]", row["scopes"])),
        models=tuple(str(pattern) for pattern in cast("list[object]", row["models"])),
        rate=parse_rate(str(row["rate"])),
        privacy=Privacy[str(row["privacy"]).upper()],
        created_s=int(str(row["created_s"])),
        expires_s=None if expires_s is None else int(str(expires_s)),
    )
    return key, KeyUse(int(str(row["uses"])), int(str(row["last_used_s"])))
