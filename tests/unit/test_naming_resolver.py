"""Resolution: classes, filters, order, and the reason for each place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_naming import index_of, node, offer

from meshd_cms.types import NodeId, node_id_text
from meshd_naming import (
    Index,
    Match,
    NotServed,
    Offer,
    PeerState,
    Resolution,
    ResolveOptions,
    Resolver,
    offer_from_descriptor,
    parse_query,
)
from meshd_naming.resolver import LEFT_OUT_MAX
from meshd_plugins.api import Descriptor, ModelFacts, Operation, Privacy, Rates

ME = node(1)
ALGEBRA, MATH, GENERAL = (
    "knowledge.gpt/math/algebra",
    "knowledge.gpt/math",
    "knowledge.gpt/general",
)


def lan(_owner: NodeId) -> Privacy:
    return Privacy.LAN


def resolve(
    index: Index,
    text: str,
    options: ResolveOptions = ResolveOptions(),  # noqa: B008 (frozen)
    **states: PeerState,
) -> Resolution:
    known = {node(number): PeerState.ALIVE for number in range(1, 200)}
    known |= {node(int(key[1:])): state for key, state in states.items()}
    return Resolver(index, ME, known, lan).resolve(parse_query(text), options, 10.0)


def who(resolution: Resolution) -> list[tuple[int, Match]]:
    return [(int.from_bytes(one.offer.owner, "big"), one.match) for one in resolution.candidates]


def test_classes_come_in_order_and_only_the_nearest_ancestor_counts() -> None:
    index = index_of(
        offer(2, GENERAL),
        offer(3, MATH),
        offer(4, ALGEBRA),
        offer(5, "knowledge.gpt/math/algebra/linear"),
        offer(6, "knowledge.gpt/cloudy", privacy=Privacy.CLOUD),
        offer(7, GENERAL, privacy=Privacy.CLOUD),
    )
    everything = ResolveOptions(privacy=Privacy.CLOUD, allow_cloud=True)
    found = resolve(index, "knowledge.gpt/math/algebra/linear", everything)
    assert who(found) == [
        (5, Match.EXACT),
        (4, Match.ANCESTOR),
        (2, Match.GENERAL),
        (7, Match.CLOUD),
    ]
    assert [one.priority for one in found.candidates] == [0, 1, 2, 3]
    assert who(resolve(index, ALGEBRA, everything))[1] == (3, Match.ANCESTOR)


def test_an_ancestor_that_cannot_serve_gives_way_to_the_next() -> None:
    index = index_of(offer(3, MATH), offer(4, ALGEBRA))
    found = resolve(index, f"{ALGEBRA}/linear", n4=PeerState.SUSPECT)
    assert who(found) == [(3, Match.ANCESTOR)]
    assert found.candidates[0].distance == 2
    assert "2 up: knowledge.gpt/math" in found.candidates[0].reason


@pytest.mark.parametrize("kind", ["data", "computation"])
def test_only_knowledge_falls_back(kind: str) -> None:
    index = index_of(offer(2, f"{kind}.gpt/math"), offer(3, f"{kind}.gpt/general"))
    found = resolve(index, f"{kind}.gpt/math/algebra")
    assert found.candidates == ()
    assert f"{kind}.gpt/math" in found.nearest


def test_an_exact_calculator_stands_before_models_of_general_knowledge() -> None:
    index = index_of(offer(2, GENERAL, decode=100.0), offer(3, "knowledge.gpt/arithmetic"))
    found = resolve(index, "knowledge.gpt/arithmetic")
    assert who(found) == [(3, Match.EXACT), (2, Match.GENERAL)]
    only = ResolveOptions(allow_general=False)
    assert who(resolve(index, "knowledge.gpt/arithmetic", only)) == [(3, Match.EXACT)]


def test_a_pattern_matches_or_does_not() -> None:
    index = index_of(offer(2, GENERAL), offer(3, MATH), offer(4, ALGEBRA))
    assert who(resolve(index, "knowledge.gpt/math/**")) == [(3, Match.EXACT), (4, Match.EXACT)]
    assert who(resolve(index, "knowledge.gpt/physics/*")) == []


def test_heavier_candidates_come_first_within_a_class() -> None:
    index = index_of(offer(2, MATH, decode=10.0), offer(3, MATH, decode=10.0, slots=4))
    found = resolve(index, MATH).candidates
    assert [(one.offer.node_name, one.weight) for one in found] == [("pi-3", 40), ("pi-2", 10)]


@pytest.mark.parametrize("state", [state for state in PeerState if state is not PeerState.ALIVE])
def test_peers_that_are_not_alive_are_left_out_with_the_reason(state: PeerState) -> None:
    index = index_of(offer(2, MATH), offer(3, MATH))
    assert who(resolve(index, MATH, n2=state)) == [(3, Match.EXACT)]
    explained = resolve(index, MATH, ResolveOptions(explain=True), n2=state)
    assert [(out.offer.node_name, out.reason) for out in explained.left_out] == [
        ("pi-2", state.value)
    ]


def test_states_may_be_a_function_and_the_local_node_needs_none() -> None:
    index = index_of(offer(1, MATH), offer(2, MATH))
    nobody = Resolver(index, ME, {}, lan).resolve(parse_query(MATH), ResolveOptions(), 0.0)
    assert who(nobody) == [(1, Match.EXACT)]
    everybody = Resolver(index, ME, lambda _: PeerState.ALIVE, lan)
    assert len(everybody.resolve(parse_query(MATH), ResolveOptions(), 0.0).candidates) == 2


def test_excluded_owners_and_other_operations() -> None:
    index = index_of(offer(2, MATH), offer(3, MATH, operations=("embed",)), offer(4, MATH))
    options = ResolveOptions(operation="chat", exclude=frozenset({node(2)}), explain=True)
    found = resolve(index, MATH, options)
    assert who(found) == [(4, Match.EXACT)]
    assert {(out.offer.node_name, out.reason) for out in found.left_out} == {
        ("pi-2", "already tried"),
        ("pi-3", "cannot chat; it can embed"),
    }


@pytest.mark.parametrize(
    ("constraint", "numbers"),
    [
        ("context>=8192", [2, 3]),
        ("context.ge=8k", [2, 3]),
        ("context>8192", [3]),
        ("context!=8192", [3, 4]),  # what does not say is not known to be equal
        ("context<=99k", [2, 3]),
        ("quant>=q4", [2, 3]),
        ("quant=q4", [2]),
        ("quant>=q4_1", [2, 3]),
        ("quant>q4_1", [3]),
        ("quant<=q4", [2]),
        ("zone=LAB", [2]),
        ("zone!=lab", [3, 4]),
        ("label=gpu", [3]),
        ("label!=gpu", [2, 4]),
        ("model=smollm2-135m", [2]),
        ("model=deadbeef", [2]),
        ("model=smollm2", []),
        ("slots>=2", [4]),
        ("x_pages>=10", [3]),
        ("x_pages=12", [3]),
        ("x_edition=Second", [4]),
        ("quant>=q4&zone=lab", [2]),
    ],
)
def test_constraints(constraint: str, numbers: list[int]) -> None:
    index = index_of(
        offer(
            2,
            MATH,
            fields={
                "context": 8192,
                "quant": "Q4_1",
                "zone": "Lab",
                "label": ["arm"],
                "model": ["SmolLM2-135M", "deadbeef" * 8],
            },
        ),
        offer(3, MATH, fields={"context": 32768, "quant": "Q8_0", "label": ["gpu"], "x_pages": 12}),
        offer(4, MATH, slots=2, fields={"x_edition": "second", "quant": "odd", "context": "8k"}),
    )
    found = resolve(index, f"{MATH}?{constraint}")
    assert sorted(number for number, _ in who(found)) == numbers


def test_a_node_is_named_by_name_or_by_a_long_enough_prefix_of_its_id() -> None:
    index = index_of(
        offer(2, MATH), Offer(NodeId(b"\xfe" * 16), "Jetson-1", MATH, parse_query(MATH), ("chat",))
    )
    state = {NodeId(b"\xfe" * 16): PeerState.ALIVE, node(2): PeerState.ALIVE}
    resolver = Resolver(index, ME, state, lan)
    text = node_id_text(NodeId(b"\xfe" * 16))
    for where, count in (("jetson-1", 1), (text[:8], 1), (text, 1), (text[:5], 0), ("jetson", 0)):
        query = parse_query(f"{MATH}@{where}")
        assert len(resolver.resolve(query, ResolveOptions(), 0.0).candidates) == count, where


@pytest.mark.parametrize(
    ("request_privacy", "allow_cloud", "numbers"),
    [
        (Privacy.LOCAL, False, [1]),
        (Privacy.LOCAL, True, [1]),
        (Privacy.LAN, False, [1, 2, 4]),
        (Privacy.MESH, False, [1, 2, 3, 4]),
        (Privacy.MESH, True, [1, 2, 3, 4]),  # the request's own class still says no
        (Privacy.CLOUD, False, [1, 2, 3, 4]),
        (Privacy.CLOUD, True, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_request_travels_no_further_than_both_sides_admit(
    request_privacy: Privacy, allow_cloud: bool, numbers: list[int]
) -> None:
    """1 is this node, 2 and 4 are near, 3 is far, 5 is near and 6 local but in the cloud."""

    def reach(owner: NodeId) -> Privacy:
        return Privacy.MESH if owner in (node(3), node(8)) else Privacy.LAN

    index = index_of(
        offer(1, MATH, privacy=Privacy.LOCAL),
        offer(2, MATH),
        offer(3, MATH),
        offer(4, MATH, privacy=Privacy.LAN),
        offer(5, MATH, privacy=Privacy.CLOUD),
        offer(7, MATH, privacy=Privacy.LOCAL),
        offer(8, MATH, privacy=Privacy.LAN),
    )
    index.put(Offer(ME, "pi-1", "cloud", parse_query(MATH), ("chat",), privacy=Privacy.CLOUD))
    states = {node(number): PeerState.ALIVE for number in range(9)}
    options = ResolveOptions(privacy=request_privacy, allow_cloud=allow_cloud, explain=True)
    found = Resolver(index, ME, states, reach).resolve(parse_query(MATH), options, 0.0)
    seen = [
        6 if one.local and one.match is Match.CLOUD else int.from_bytes(one.offer.owner, "big")
        for one in found.candidates
    ]
    assert sorted(seen) == numbers
    assert len(found.candidates) + len(found.left_out) == len(index)


def test_the_privacy_constraint_speaks_of_where_the_request_would_go() -> None:
    index = index_of(offer(1, MATH), offer(2, MATH))
    assert len(resolve(index, f"{MATH}?privacy<=lan").candidates) == 2
    assert who(resolve(index, f"{MATH}?privacy.eq=local")) == [(1, Match.EXACT)]
    assert who(resolve(index, f"{MATH}?privacy!=local")) == [(2, Match.EXACT)]
    far = Resolver(index, ME, lambda _: PeerState.ALIVE)  # reach not known: everyone is far
    found = far.resolve(parse_query(f"{MATH}?privacy<=lan"), ResolveOptions(), 0.0)
    assert who(found) == [(1, Match.EXACT)]


def test_the_index_may_change_between_two_resolutions() -> None:
    index = index_of(offer(2, MATH))
    resolver = Resolver(index, ME, lambda _: PeerState.ALIVE)
    query, options = parse_query(MATH), ResolveOptions()
    assert len(resolver.resolve(query, options, 0.0).candidates) == 1
    index.put(offer(3, MATH))
    assert len(resolver.resolve(query, options, 0.0).candidates) == 2
    index.discard_owner(node(2))
    assert who(resolver.resolve(query, options, 0.0)) == [(3, Match.EXACT)]


def test_reasons_and_ages() -> None:
    index = index_of(offer(2, MATH, decode=103.2, updated_at_s=8.8), offer(1, MATH))
    near, local = resolve(index, MATH).candidates
    assert near.age_s == pytest.approx(1.2)
    assert near.reason == "exact match; 103 tok/s decode; record 1.2 s old"
    assert (local.age_s, local.reason) == (0.0, "exact match; on this node")
    assert near.to_value()["reason"] == near.reason


def test_when_nobody_serves_the_error_says_why_and_what_is_near() -> None:
    index = index_of(offer(2, "computation.gpt/arithmetic"), offer(3, "computation.gpt/units"))
    found = resolve(index, "computation.gpt/arithmetik", n2=PeerState.SUSPECT)
    error = found.not_served()
    assert isinstance(error, NotServed)
    assert found.nearest[0] == error.suggestion == "computation.gpt/arithmetic"
    assert 'nearest: "computation.gpt/arithmetic"' in error.message
    blocked = resolve(index, "computation.gpt/arithmetic", n2=PeerState.SUSPECT)
    assert "pi-2: suspected" in blocked.not_served().message
    assert blocked.to_value()["candidates"] == []


def test_what_is_left_out_is_bounded() -> None:
    index = index_of(*(offer(number, MATH) for number in range(2, 102)))
    options = ResolveOptions(operation="embed", explain=True)
    found = resolve(index, MATH, options)
    assert (len(found.left_out), found.left_out_more) == (LEFT_OUT_MAX, 100 - LEFT_OUT_MAX)


def test_a_descriptor_becomes_an_offer_with_comparable_fields() -> None:
    model = ModelFacts("ab" * 32, "SmolLM2-135M-Instruct", "llama", 134_515_008, "Q4_1", 8192, 98)
    descriptor = Descriptor(
        GENERAL,
        (Operation.CHAT,),
        "a model",
        1,
        model=model,
        rates=Rates(500.0, 103.0),
        fields={"price": 0},
    )
    one = offer_from_descriptor(node(2), "pi-2", descriptor, updated_at_s=1.0, zone="lab")
    index = index_of(one)
    text = "context>=8k&quant=q4_1&zone=lab&parameters<200M&model=abababab&price=0&tokens_per_s>100"
    assert who(resolve(index, f"{GENERAL}?{text}", ResolveOptions(operation="chat")))
    assert one.capability_id == f"{GENERAL}#abababab"


_PLACES = (GENERAL, MATH, ALGEBRA, "knowledge.gpt/art", "data.gpt/math", "data.gpt/general")


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from(_PLACES), st.sampled_from(Privacy)),
        max_size=12,
        unique_by=lambda put: put[:2],
    ),
    st.sampled_from((*_PLACES, f"{ALGEBRA}/linear", "data.gpt/**", "knowledge.gpt/*")),
    st.dictionaries(st.integers(2, 6), st.sampled_from(PeerState)),
    st.sampled_from(Privacy),
    st.booleans(),
    st.frozensets(st.integers(1, 6), max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_every_offer_of_a_class_is_a_candidate_or_left_out(
    puts: list[tuple[int, str, Privacy]],
    text: str,
    states: dict[int, PeerState],
    privacy: Privacy,
    allow_cloud: bool,
    exclude: frozenset[int],
) -> None:
    index = index_of(*(offer(number, path, privacy=level) for number, path, level in puts))
    known = {node(number): state for number, state in states.items()}
    resolver = Resolver(index, ME, known, lan)
    excluded = frozenset(node(number) for number in exclude)
    quick = ResolveOptions(privacy=privacy, allow_cloud=allow_cloud, exclude=excluded)
    slow = ResolveOptions(privacy=privacy, allow_cloud=allow_cloud, exclude=excluded, explain=True)
    query = parse_query(text)
    found = resolver.resolve(query, slow, 1.0)
    assert resolver.resolve(query, quick, 1.0).candidates == found.candidates
    both = [one.offer for one in found.candidates] + [out.offer for out in found.left_out]
    assert len({(one.owner, one.capability_id) for one in both}) == len(both), "each once"
    assert set(map(id, index.lookup(query))) <= set(map(id, both)), "none forgotten"
    for one in found.candidates:
        assert one.offer.owner == ME or known.get(one.offer.owner) is PeerState.ALIVE
        assert one.offer.owner not in excluded
        travel = Privacy.LOCAL if one.local else Privacy.LAN
        travel = Privacy.CLOUD if one.offer.privacy is Privacy.CLOUD else travel
        assert travel <= min(privacy, one.offer.privacy)
        assert (one.match is Match.CLOUD) == (one.offer.privacy is Privacy.CLOUD)
    places = [(one.priority, one.distance, -one.weight) for one in found.candidates]
    assert places == sorted(places)
    assert len({one.distance for one in found.candidates if one.match is Match.ANCESTOR}) <= 1
