"""What the rules decide: order, default, who is who, and that what is not known is held against the caller."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_naming import index_of, offer

from meshd.config import access_rules
from meshd.orchestrate.access import OPEN, AccessPolicy, Standing
from meshd.orchestrate.callers import Caller
from meshd_cms import NodeId, node_id_text
from meshd_naming import parse_capability_name, parse_query
from meshd_plugins.api import Privacy, Refused, Value

ME, LAPTOP, TWIN, STRANGER = (NodeId(letter * 16) for letter in (b"m", b"l", b"t", b"s"))
DIARY = parse_capability_name("data.gpt/diary/today")
STANDINGS = {
    ME: Standing("pi", role="issuer"),
    LAPTOP: Standing("laptop", role="member"),
    TWIN: Standing("twin", is_name_shared=True, role="observer"),
    STRANGER: Standing(),
}


def rule(
    effect: str, *callers: str, name: str = "data.gpt/diary/**", **more: Value
) -> dict[str, Value]:
    return {"name": name, "effect": effect, "callers": list(callers) or ["anyone"], **more}


def policy(*rules: Mapping[str, Value]) -> AccessPolicy:
    return AccessPolicy(access_rules(rules), ME, STANDINGS.__getitem__)


def allowed(rules: AccessPolicy, node: NodeId, principal: str = "local") -> bool:
    return rules.decide(DIARY, Caller(node, principal), Privacy.MESH).allowed


def test_without_a_rule_about_it_a_capability_is_open() -> None:
    assert policy().decide(DIARY, Caller(STRANGER), Privacy.CLOUD) is OPEN
    other = policy(rule("deny", name="data.gpt/other"))
    assert other.decide(DIARY, Caller(STRANGER), Privacy.CLOUD) is OPEN


def test_with_one_about_it_whoever_is_not_allowed_is_denied() -> None:
    rules = policy(rule("allow", "laptop"))
    assert allowed(rules, LAPTOP)
    decision = rules.decide(DIARY, Caller(STRANGER), Privacy.MESH)
    assert (decision.allowed, decision.code, decision.rule) == (False, "access", None)
    assert "(1)" in decision.why
    with pytest.raises(Refused) as caught:
        decision.enforce()
    assert caught.value.code == "access"


def test_the_first_that_fits_decides_and_says_so() -> None:
    rules = policy(rule("deny", "laptop"), rule("allow"), rule("deny"))
    first = rules.decide(DIARY, Caller(LAPTOP), Privacy.MESH)
    assert (first.allowed, first.rule) == (False, 1)
    second = rules.decide(DIARY, Caller(ME), Privacy.MESH)
    assert (second.allowed, second.rule) == (True, 2)
    assert "rule 2 (data.gpt/diary/**)" in second.why


def test_a_rule_is_about_its_classes_only() -> None:
    rules = policy(rule("allow", privacy=["local", "lan"]))
    caller = Caller(LAPTOP)
    assert rules.decide(DIARY, caller, Privacy.LAN).allowed
    assert not rules.decide(DIARY, caller, Privacy.MESH).allowed


@pytest.mark.parametrize(
    ("word", "node", "principal", "fits"),
    [
        ("local", ME, "local", True),
        ("local", ME, "loopback", True),
        ("local", ME, "key:phone", False),
        ("local", LAPTOP, "local", False),
        ("mesh", LAPTOP, "key:phone", True),
        ("mesh", ME, "local", False),
        ("laptop", LAPTOP, "key:phone", True),
        ("laptop", ME, "local", False),
        ("pi", ME, "key:phone", True),
        (node_id_text(STRANGER), STRANGER, "local", True),
        (node_id_text(STRANGER), LAPTOP, "local", False),
        ("key:phone", ME, "key:phone", True),
        ("key:phone", ME, "key:tablet", False),
        ("key:phone", LAPTOP, "key:phone", False),  # another node's key of the same name
        ("key:phone@laptop", LAPTOP, "key:phone", True),
        ("key:phone@laptop", ME, "key:phone", False),
        ("key:*", ME, "key:tablet", True),
        ("key:*", ME, "local", False),
        ("key:phone@*", STRANGER, "key:phone", True),
        ("role:member", LAPTOP, "local", True),
        ("role:observer", LAPTOP, "local", False),
        ("anyone", STRANGER, "key:phone", True),
    ],
)
def test_who_a_word_means(word: str, node: NodeId, principal: str, fits: bool) -> None:
    assert allowed(policy(rule("allow", word)), node, principal) is fits
    assert allowed(policy(rule("deny", word), rule("allow")), node, principal) is not fits


@pytest.mark.parametrize(
    ("word", "node"),
    [("twin", TWIN), ("laptop", STRANGER), ("role:member", STRANGER), ("key:phone@twin", TWIN)],
)
def test_what_is_not_sure_does_not_let_in_and_does_shut_out(word: str, node: NodeId) -> None:
    principal = "key:phone" if word.startswith("key") else "local"
    assert not allowed(policy(rule("allow", word)), node, principal)
    decision = policy(rule("deny", word), rule("allow")).decide(
        DIARY, Caller(node, principal), Privacy.MESH
    )
    assert not decision.allowed
    assert "as far as is known" in decision.why


@pytest.mark.parametrize(
    ("words", "principal", "tried"),
    [
        (["mesh"], "local", True),  # as that node will see it
        (["local"], "local", True),  # as this node sees it: it is for that one to refuse
        (["key:phone"], "key:phone", True),
        (["key:phone"], "key:tablet", False),
        (["laptop"], "local", False),
        (["pi"], "local", True),
    ],
)
def test_a_candidate_elsewhere_is_tried_unless_a_copy_of_the_rules_would_refuse(
    words: list[str], principal: str, tried: bool
) -> None:
    decision = policy(rule("allow", *words)).decide(
        DIARY, Caller(ME, principal), Privacy.MESH, server=LAPTOP
    )
    assert decision.allowed is tried


def test_what_was_decided_is_forgotten_when_members_change() -> None:
    standings = dict(STANDINGS)
    rules = AccessPolicy(access_rules([rule("allow", "laptop")]), ME, standings.__getitem__)
    assert allowed(rules, LAPTOP)
    standings[LAPTOP] = Standing("laptop", is_name_shared=True)
    rules.members_changed()
    assert not allowed(rules, LAPTOP)


labels = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3)


@given(
    names=st.lists(labels, min_size=1, max_size=6),
    pattern=st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=3),
    rest=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_rule_is_about_what_a_query_of_the_same_pattern_finds(
    names: list[list[str]], pattern: list[str], rest: bool
) -> None:
    query = parse_query("data.gpt/" + "/".join([*pattern, *(["**"] if rest else [])]))
    offers = [offer(n, "data.gpt/" + "/".join(each)) for n, each in enumerate(names)]
    offers.append(offer(99, "knowledge.gpt/a"))
    found = index_of(*offers).lookup(query)
    assert {each.owner for each in found} == {
        each.owner for each in offers if query.covers(each.name)
    }


words = st.sampled_from(
    ["anyone", "local", "mesh", "laptop", "twin", "key:phone", "key:phone@laptop", "role:observer"]
)
rules_drawn = st.lists(
    st.builds(
        lambda effect, callers, name, classes: {
            "effect": effect,
            "callers": callers,
            "name": name,
            "privacy": classes,
        },
        st.sampled_from(["allow", "deny"]),
        st.lists(words, min_size=1, max_size=3),
        st.sampled_from(["data.gpt/diary/*", "data.gpt/**", "data.gpt/other", "knowledge.gpt/**"]),
        st.lists(st.sampled_from(["local", "lan", "mesh", "cloud"]), min_size=1, unique=True),
    ),
    max_size=5,
)


@given(
    rules=rules_drawn,
    node=st.sampled_from([ME, LAPTOP, TWIN, STRANGER]),
    principal=st.sampled_from(["local", "loopback", "key:phone"]),
    privacy=st.sampled_from(Privacy),
)
@settings(max_examples=100, deadline=None)
def test_nobody_is_let_in_but_by_an_allowing_rule_about_it(
    rules: list[Mapping[str, Value]], node: NodeId, principal: str, privacy: Privacy
) -> None:
    decided = policy(*rules)
    decision = decided.decide(DIARY, Caller(node, principal), privacy)
    about = [each for each in decided.rules if each.name.covers(DIARY)]
    if not about:
        assert decision is OPEN
    elif decision.allowed:
        [by] = [each for each in about if each.number == decision.rule]
        assert by.effect == "allow"
        assert privacy in by.privacy
    else:
        assert decision.code == "access"
    again = decided.decide(DIARY, Caller(node, principal), privacy)
    assert again is decision or not decided.rules
