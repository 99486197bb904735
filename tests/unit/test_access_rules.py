"""[[access.rules]] as it is read: what a rule may say, and that a slip is refused where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from meshd.config import BadValue, Config, Machine, access_rules, load
from meshd.config.access import CallerKind, CallerTerm, Effect
from meshd_cms import NodeId, node_id_text
from meshd_plugins.api import Privacy, Value

ID = NodeId(b"0123456789abcdef")
DIARY: dict[str, Value] = {"name": "data.gpt/diary/**", "effect": "allow"}


def loaded(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "meshd.toml"
    path.write_text(text)
    nowhere = tmp_path / "absent"
    machine = Machine({}, "pi", 4_000_000, nowhere, nowhere, nowhere, nowhere)
    return load([path], machine=machine)


def test_a_rule_says_who_what_and_which_classes() -> None:
    callers: list[Value] = ["anyone", "local", "mesh", "laptop", node_id_text(ID), "role:observer"]
    callers += ["key:phone", "key:*@laptop", f"key:phone@{node_id_text(ID)}", "key:phone@*"]
    [rule] = access_rules(
        [{**DIARY, "callers": callers, "privacy": ["lan", "local"], "comment": "family"}]
    )
    assert (rule.number, str(rule.name), rule.effect) == (1, "data.gpt/diary/**", Effect.ALLOW)
    assert rule.privacy == {Privacy.LOCAL, Privacy.LAN}
    assert rule.comment == "family"
    assert [str(term) for term in rule.callers] == callers
    assert rule.callers[4] == CallerTerm(CallerKind.NODE, node_id_text(ID), ID)
    assert rule.callers[8].node == ID


def test_what_is_left_out_is_everybody_and_every_class() -> None:
    [rule] = access_rules([DIARY])
    assert rule.callers == (CallerTerm(CallerKind.ANYONE),)
    assert rule.privacy == set(Privacy)


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"caller": ["local"]}, "caller", 'did you mean "callers"?'),
        ({"name": "data.gtp/diary"}, "name", "nearest"),
        ({"name": "data.gpt/diary@pi"}, "name", "no node and no constraints"),
        ({"name": 7}, "name", "a name or a pattern"),
        ({"effect": "alow"}, "effect", 'did you mean "allow"?'),
        ({"callers": "local"}, "callers", "expected a list"),
        ({"callers": []}, "callers", "1 to 64"),
        ({"callers": ["Anyone"]}, "callers", 'did you mean "anyone"?'),
        ({"callers": ["role:observr"]}, "callers", 'did you mean "observer"?'),
        ({"callers": ["role:client"]}, "callers", "expected one of member, issuer, observer"),
        ({"callers": ["kye:phone"]}, "callers", 'did you mean "key"?'),
        ({"callers": ["key:"]}, "callers", "expected key:NAME"),
        ({"callers": ["key:phone@"]}, "callers", "no node's name or id"),
        ({"privacy": ["lan", "wan"]}, "privacy", 'did you mean "lan"?'),
        ({"privacy": []}, "privacy", "expected one of"),
        ({"comment": "x" * 201}, "comment", "at most 200"),
    ],
)
def test_a_slip_is_refused_with_its_line_and_what_would_be_right(
    tmp_path: Path, change: Mapping[str, Value], key: str, says: str
) -> None:
    def toml(value: Value) -> str:
        match value:
            case str():
                return f'"{value}"'
            case list():
                return f"[{', '.join(map(toml, value))}]"
            case _:
                return str(value)

    rule = {**DIARY, **change}
    lines = ["[node]", 'name = "pi"', "[[access.rules]]", 'name = "**"'.replace("**", "data.gpt/x")]
    lines += ['effect = "deny"', "", "[[access.rules]]  # the diary"]
    lines += [f"{name} = {toml(value)}" for name, value in rule.items()]
    lines += ["[log]", 'level = "info"']
    with pytest.raises(BadValue) as caught:
        loaded(tmp_path, "\n".join(lines))
    place = next(n for n, line in enumerate(lines, 1) if n > 7 and line.startswith(f"{key} ="))
    assert caught.value.origin == f"{tmp_path / 'meshd.toml'}, line {place}"
    assert caught.value.key == f"access.rules.2.{key}"
    assert "rule 2: " in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("missing", ["name", "effect"])
def test_what_a_rule_cannot_do_without_is_asked_for(tmp_path: Path, missing: str) -> None:
    rest = {"name": 'effect = "deny"', "effect": 'name = "data.gpt/x"'}[missing]
    with pytest.raises(BadValue, match=f"line 2: rule 1: {missing} is missing"):
        loaded(tmp_path, f"[access]\n[[access.rules]]\n{rest}\n")


def test_rules_can_come_by_a_variable_and_are_named_after_it(tmp_path: Path) -> None:
    nowhere = tmp_path / "absent"
    rules = '[{name = "data.gpt/x", effect = "never"}]'
    machine = Machine({"MESHD_ACCESS_RULES": rules}, "pi", 1, nowhere, nowhere, nowhere, nowhere)
    with pytest.raises(BadValue, match="MESHD_ACCESS_RULES: rule 1: effect"):
        load(machine=machine)
    with pytest.raises(BadValue, match=r"access\.rules"):
        loaded(tmp_path, "[access]\nrules = 7\n")


def test_there_is_an_end_to_rules() -> None:
    with pytest.raises(ValueError, match="more than 256"):
        access_rules([DIARY] * 257)
