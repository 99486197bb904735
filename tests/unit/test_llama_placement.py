"""Which layers go where, which lenders are used, and what is said when it does not work out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd_plugins.api import PeerOffer, PluginConfigError, Privacy, Value
from meshd_plugins.builtin.llama.running.fit import GIB, MIB, DoesNotFit, Shape, need
from meshd_plugins.builtin.llama.split.config import AUTO, RpcConfig, read_rpc, read_split
from meshd_plugins.builtin.llama.split.coordinator import missing, plan, usable
from meshd_plugins.builtin.llama.split.placement import (
    Lent,
    capacity_of,
    choose_lenders,
    place_layers,
)
from meshd_plugins.builtin.llama.worker.rpc_client import shares_of

SHAPE = Shape(
    weights_bytes=9 * GIB,
    block_bytes=8 * GIB,
    layers=32,
    kv_row_bytes=128 * 1024,
    state_bytes=0,
    embedding=4096,
    feed_forward=14336,
    heads=32,
    vocabulary=128_000,
    context_tokens=8192,
)
NEED = need(SHAPE, 4096, 1, 512)
BUILD = "0.25.3-abc"


def lent(*gib: float) -> list[Lent]:
    return [Lent(f"n{index}", int(each * GIB)) for index, each in enumerate(gib)]


def test_layers_follow_the_memory_and_nobody_gets_more_than_it_holds() -> None:
    lenders = lent(4, 4)
    layers = place_layers(SHAPE, NEED, 6 * GIB, lenders)
    capacity = capacity_of(SHAPE, NEED, 6 * GIB, lenders)
    assert layers[0] == layers[1]
    assert sum(layers) + capacity.here >= SHAPE.layers
    assert all(0 < got <= most for got, most in zip(layers, capacity.lenders, strict=True))


@given(
    here=st.integers(0, 30),
    gib=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    layers=st.integers(2, 90),
)
@settings(max_examples=100, deadline=None)
def test_every_layer_has_one_place_that_holds_it(here: int, gib: list[int], layers: int) -> None:
    shape, lenders = replace(SHAPE, layers=layers), lent(*gib)
    capacity = capacity_of(shape, NEED, here * GIB, lenders)
    try:
        placed = place_layers(shape, NEED, here * GIB, lenders)
    except DoesNotFit:
        fits = capacity.here + sum(capacity.lenders) >= layers
        assert not fits or not all(capacity.lenders) or layers <= len(gib)
        return
    rest = layers - sum(placed)
    assert 0 <= rest <= capacity.here
    assert all(1 <= got <= most for got, most in zip(placed, capacity.lenders, strict=True))


def test_as_few_lenders_as_it_takes_the_largest_first() -> None:
    assert choose_lenders(SHAPE, NEED, 64 * GIB, lent(4, 8)) == ()
    assert choose_lenders(SHAPE, NEED, 6 * GIB, lent(1, 8, 2)) == (Lent("n1", 8 * GIB),)
    assert len(choose_lenders(SHAPE, NEED, 4 * GIB, lent(3, 3, 3))) == 3


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(DoesNotFit) as caught:
        choose_lenders(SHAPE, NEED, 2 * GIB, lent(1))
    text = str(caught.value)
    assert "32 layers of 272 MiB" in text
    assert "here (2.00 GiB free)" in text
    assert "on n0 (1.00 GiB offered)" in text
    assert "offer_mib" in text


@given(st.lists(st.integers(1, 40), min_size=1, max_size=15))
@settings(max_examples=100, deadline=None)
def test_llama_cpp_puts_the_layers_where_they_were_meant_to_go(layers: list[int]) -> None:
    """As llama.cpp counts: layer j of n goes to the first device whose cumulative share is above j / n."""
    shares = shares_of(layers)
    total = sum(shares)
    count = sum(layers) + 1
    placed = [0] * len(layers)
    for index in range(count):
        device = next(d for d in range(len(shares)) if sum(shares[: d + 1]) / total > index / count)
        placed[device] += 1
    placed[-1] -= 1  # what stands after the last layer
    assert placed == layers


def offer(name: str, **changed: object) -> PeerOffer:
    fields: dict[str, Value] = {"memory_mib": 4096, "build": BUILD}
    base = PeerOffer(
        node=name * 4,
        node_name=name,
        capability="computation.gpt/memory",
        name="computation.gpt/memory",
        operations=("tunnel",),
        slots=1,
        busy=0,
        distance=Privacy.LAN,
        round_trip_s=0.001,
        fields=fields,
    )
    return replace(base, **changed)  # type: ignore[arg-type]


def test_only_lenders_of_the_same_build_that_are_free_are_used() -> None:
    offers = [
        offer("b"),
        offer("c", busy=1),
        offer("d", fields={"memory_mib": 4096, "build": "another"}),
        offer("e", distance=Privacy.MESH),
        offer("f", fields={"memory_mib": "much", "build": BUILD}),
    ]
    assert list(usable(offers, BUILD, AUTO)) == ["b"]
    assert list(usable(offers, BUILD, ("b", "c", "d", "e", "f", "g"))) == ["b", "e"]
    reasons = missing(offers, BUILD, ("c", "d", "g"))
    assert "c lends its memory to another model" in reasons
    assert "d has another build" in reasons
    assert "g offers no memory" in reasons
    assert "not near" in missing(offers, BUILD, AUTO)
    assert "offer_mib" in missing([], BUILD, AUTO)


def test_named_nodes_all_take_part_and_others_only_as_needed() -> None:
    offers = {"b": offer("b"), "c": offer("c")}
    named = plan(SHAPE, NEED, 64 * GIB, offers, ("b", "c"))
    assert [part.offer.node_name for part in named] == ["b", "c"]
    assert all(part.layers >= 1 for part in named)
    assert plan(SHAPE, NEED, 64 * GIB, offers, AUTO) == ()
    assert len(plan(SHAPE, NEED, 8 * GIB, offers, AUTO)) == 1


def test_the_configuration_is_checked() -> None:
    assert read_rpc({}) == RpcConfig()
    read = read_rpc({"rpc": {"offer_mib": 2048, "threads": 2, "allow_loopback": True}})
    assert (read.offer_bytes, read.threads, read.allow_loopback) == (2048 * MIB, 2, True)
    for wrong in (
        {"rpc": 5},
        {"rpc": {"offer": 1}},
        {"rpc": {"offer_mib": -1}},
        {"rpc": {"offer_mib": True}},
        {"rpc": {"gpu": 1}},
        {"rpc": {"privacy": "cloud"}},
        {"rpc": {"silence_s": 1}},
    ):
        with pytest.raises(PluginConfigError, match=r"plugins\.llama\.rpc"):
            read_rpc(wrong)  # type: ignore[arg-type]
    assert read_split({}, "m") == ()
    assert read_split({"split": "auto"}, "m") == AUTO
    assert read_split({"split": ["b", "c"]}, "m") == ("b", "c")
    for value in ("b", 3, [""], ["b", "b"], [str(n) for n in range(16)]):
        with pytest.raises(PluginConfigError, match="names of nodes"):
            read_split({"split": value}, "m")  # type: ignore[dict-item]
