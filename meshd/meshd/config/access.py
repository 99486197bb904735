"""From the tables [[access.rules]] to rules: who may use which capabilities, for requests of which class.

What a rule decides is in `meshd.orchestrate.access`; here it is read, and refused if it cannot mean anything.
A rule that is misspelt must not pass for one that says nothing, so every key, class, role and caller is
checked, and the nearest one that exists is named.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, cast

from meshd_cms import NodeId, node_id_parse
from meshd_naming import Name, NamingError, parse_query
from meshd_plugins.api import Privacy, Value

RULES_MAX: Final = 256
CALLERS_MAX: Final = 64  # of one rule
COMMENT_CHARS_MAX: Final = 200
NODE_ID_CHARS: Final = 26
ROLES: Final = ("member", "issuer", "observer")
ANY_WORD: Final = "*"

_KEYS: Final = ("name", "callers", "privacy", "effect", "comment")
_CLASSES: Final = {level.name.lower(): level for level in Privacy}
_NODE: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_KEY_NAME: Final = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RULE_HEAD: Final = re.compile(r"\s*\[\[\s*access\s*\.\s*rules\s*\]\]")
_OTHER_HEAD: Final = re.compile(r"\s*\[")


class Effect(StrEnum):
    """What a rule says of those whom it is about."""

    ALLOW = "allow"
    DENY = "deny"


class CallerKind(StrEnum):
    """What a word in `callers` is about."""

    ANYONE = "anyone"
    LOCAL = "local"  # people and programs on this machine
    MESH = "mesh"  # whoever asks at another member
    ROLE = "role"  # at a member of this role
    KEY = "key"  # with an API key of this name
    NODE = "node"  # at this member


@dataclass(frozen=True, slots=True)
class CallerTerm:
    """One of the callers that a rule is about."""

    kind: CallerKind
    word: str = (
        ""  # ROLE: the role; KEY: the key's name, or `*`; NODE: the node's name, "" for an id
    )
    node: NodeId | None = None  # KEY and NODE: the id, where it was written as one
    at: str = ""  # KEY: where it is one, by name; "" with no id: on this node; `*`: anywhere

    def __str__(self) -> str:
        """As it is written."""
        match self.kind:
            case CallerKind.ROLE:
                return f"role:{self.word}"
            case CallerKind.NODE:
                return self.word
            case CallerKind.KEY:
                return f"key:{self.word}" + (f"@{self.at}" if self.at else "")
            case CallerKind.ANYONE | CallerKind.LOCAL | CallerKind.MESH:
                return self.kind.value


@dataclass(frozen=True, slots=True)
class AccessRule:
    """One table [[access.rules]]."""

    number: int  # its place, from 1
    name: Name  # a name or a pattern, bare
    callers: tuple[CallerTerm, ...]
    privacy: frozenset[Privacy]  # the classes of requests that it is about
    effect: Effect
    comment: str


class BadRule(ValueError):
    """A rule that cannot be used; the text says what would do."""

    def __init__(self, number: int, key: str, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.key = key


def access_rules(tables: Sequence[Mapping[str, Value]]) -> tuple[AccessRule, ...]:
    """The rules, in their order.

    Raises:
        BadRule: one of them cannot be used.
    """
    if len(tables) > RULES_MAX:
        raise BadRule(RULES_MAX + 1, "", f"more than {RULES_MAX} rules")
    return tuple(_rule(number, table) for number, table in enumerate(tables, 1))


def rule_line(text: str, number: int, key: str) -> int | None:
    """The line in which a rule, or a key of it, stands in a file; None where it cannot be told."""
    place, found = 0, None
    for line, content in enumerate(text.splitlines(), 1):
        if _RULE_HEAD.match(content):
            place += 1
            if place == number:
                found = line
        elif place == number and found is not None:
            if _OTHER_HEAD.match(content) and "=" not in content:
                break
            if key and re.match(rf"\s*{re.escape(key)}\s*=", content):
                return line
    return found


def _rule(number: int, table: Mapping[str, Value]) -> AccessRule:
    for key in table:
        if key not in _KEYS:
            raise BadRule(number, key, f'unknown key "{key[:64]}"; {_near(key, _KEYS)}')
    for key in ("name", "effect"):
        if key not in table:
            raise BadRule(number, key, f"{key} is missing: {_EXAMPLES[key]}")
    comment = table.get("comment", "")
    if not isinstance(comment, str) or len(comment) > COMMENT_CHARS_MAX:
        raise BadRule(
            number, "comment", f"comment: expected at most {COMMENT_CHARS_MAX} characters"
        )
    effects = [effect.value for effect in Effect]
    effect = table["effect"]
    if effect not in effects:
        raise BadRule(number, "effect", f"effect = {_shown(effect)}: {_near(str(effect), effects)}")
    return AccessRule(
        number=number,
        name=_name(number, table["name"]),
        callers=tuple(_callers(number, table.get("callers", ["anyone"]))),
        privacy=frozenset(_classes(number, table.get("privacy", list(_CLASSES)))),
        effect=Effect(effect),
        comment=comment,
    )


_EXAMPLES: Final = {
    "name": 'a name or a pattern, such as name = "data.gpt/private/**"',
    "effect": 'effect = "allow" or effect = "deny"',
}


def _name(number: int, value: Value) -> Name:
    if not isinstance(value, str):
        raise BadRule(number, "name", f"name = {_shown(value)}: expected {_EXAMPLES['name']}")
    try:
        name = parse_query(value)
    except NamingError as error:
        raise BadRule(number, "name", f"name: {error}") from error
    if not name.is_bare:
        raise BadRule(
            number, "name", f'name = "{value}": a rule\'s name has no node and no constraints'
        )
    return name


def _callers(number: int, value: Value) -> Iterator[CallerTerm]:
    words = _texts(number, "callers", value)
    if not 1 <= len(words) <= CALLERS_MAX:
        raise BadRule(number, "callers", f"callers: expected 1 to {CALLERS_MAX} of them")
    for word in words:
        yield _caller(number, word)


def _caller(number: int, word: str) -> CallerTerm:
    if word in _PLAIN:
        return CallerTerm(_PLAIN[word])
    prefix, colon, rest = word.partition(":")
    if not colon:
        node, name = _node(word)
        if node is None and not _NODE.fullmatch(word):
            raise BadRule(
                number,
                "callers",
                f'callers: "{word[:64]}" {_near(word, [*_PLAIN, "role:observer"])}',
            )
        return CallerTerm(CallerKind.NODE, name, node)
    if prefix == "role":
        if rest not in ROLES:
            raise BadRule(
                number, "callers", f'callers: no role "{rest[:64]}"; {_near(rest, ROLES)}'
            )
        return CallerTerm(CallerKind.ROLE, rest)
    if prefix == "key":
        return _key(number, rest)
    known = ("role", "key")
    raise BadRule(number, "callers", f'callers: "{word[:64]}" {_near(prefix, known)}, then ":"')


def _key(number: int, text: str) -> CallerTerm:
    name, at_sign, place = text.partition("@")
    if not _KEY_NAME.fullmatch(name):
        raise BadRule(
            number,
            "callers",
            f'callers: "key:{text[:64]}": expected key:NAME, key:NAME@NODE, or key:* for any key',
        )
    if not at_sign:
        return CallerTerm(CallerKind.KEY, name)
    node, known_as = _node(place)
    if place != ANY_WORD and node is None and not _NODE.fullmatch(place):
        raise BadRule(number, "callers", f'callers: "{place[:64]}" is no node\'s name or id')
    return CallerTerm(CallerKind.KEY, name, node, known_as)


def _node(word: str) -> tuple[NodeId | None, str]:
    """The id that a word is, and the word: an id is written whole, so that nobody can grind one like it."""
    if len(word) != NODE_ID_CHARS:
        return None, word
    try:
        return node_id_parse(word), word
    except ValueError:
        return None, word


_PLAIN: Final = {
    kind.value: kind for kind in (CallerKind.ANYONE, CallerKind.LOCAL, CallerKind.MESH)
}


def _classes(number: int, value: Value) -> Iterator[Privacy]:
    words = _texts(number, "privacy", value)
    if not words:
        raise BadRule(number, "privacy", f"privacy: expected one of {', '.join(_CLASSES)}, or more")
    for word in words:
        if word not in _CLASSES:
            raise BadRule(
                number, "privacy", f'privacy: "{word[:64]}" is no class; {_near(word, _CLASSES)}'
            )
        yield _CLASSES[word]


def _texts(number: int, key: str, value: Value) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRule(number, key, f'{key} = {_shown(value)}: expected a list of texts, ["..."]')
    return cast("list[str]", value)


def _near(word: str, valid: Sequence[str] | Mapping[str, object]) -> str:
    """`did you mean "deny"?`, or what there is."""
    choices = list(valid)
    close = difflib.get_close_matches(word.lower(), choices, 1, 0.6)
    return f'did you mean "{close[0]}"?' if close else f"expected one of {', '.join(choices)}"


def _shown(value: Value) -> str:
    return repr(value)[:64]
