"""Bodies of `/v1/embeddings` and `/v1/rerank`; what such requests are expected to take; where they go."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tests.unit.support_naming import offer

from meshd.core.scheduler import Demand, ExpectedTimePolicy, Load, View
from meshd.edge.embeddings_request import parse_embeddings, parse_rerank
from meshd.edge.errors import RequestError
from meshd.edge.targets import Models
from meshd.orchestrate.events import Ask
from meshd.orchestrate.planner import plan
from meshd.orchestrate.router import demand_of
from meshd_naming import Candidate, Match
from meshd_plugins.api import Operation, Privacy, Request, Value
from meshd_plugins.vectors import INPUTS_MAX

EMBED, RERANK = "computation.gpt/embed", "computation.gpt/rerank"


def test_a_text_or_a_list_of_them_may_be_embedded() -> None:
    one = parse_embeddings({"model": EMBED, "input": "a", "user": "u", "unheard_of": 1})
    assert (one.texts, one.base64, one.operation) == (("a",), False, Operation.EMBED)
    assert one.body == {"input": ["a"], "truncate": False}
    many = parse_embeddings(
        {
            "model": "auto",
            "input": ["a", "b"],
            "encoding_format": "base64",
            "dimensions": 64,
            "meshd": {"deadline_s": 3, "privacy": "lan", "truncate": True},
        }
    )
    assert many.body == {"input": ["a", "b"], "dimensions": 64, "truncate": True}
    assert (many.base64, many.deadline_s, many.privacy) == (True, 3, Privacy.LAN)


def test_documents_may_be_texts_or_objects_with_one() -> None:
    wanted = parse_rerank(
        {
            "model": RERANK,
            "query": "q",
            "documents": ["a", {"text": "b"}],
            "top_n": 1,
            "return_documents": True,
            "truncate": True,
        }
    )
    assert wanted.body == {"query": "q", "documents": ["a", "b"], "truncate": True}
    assert (wanted.texts, wanted.top_n, wanted.return_documents) == (("a", "b"), 1, True)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": {}}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"input": [[1], [2]]}, "input"),
        ({"input": ""}, "input[0]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", None]}, "input[1]"),
        ({"input": ["a", "\ud800"]}, "input[1]"),
        ({"input": ["a"] * (INPUTS_MAX + 1)}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
        ({"truncate": 1}, "truncate"),
        ({"meshd": []}, "meshd"),
        ({"meshd": {"privcy": "lan"}}, "meshd.privcy"),
        ({"meshd": {"privacy": "far"}}, "meshd.privacy"),
    ],
)
def test_what_is_wrong_with_a_body_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_embeddings({"model": EMBED, "input": ["a"], **change})
    assert (caught.value.param, caught.value.status) == (param, 400)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"query": None}, "query"),
        ({"query": ["q"]}, "query"),
        ({"documents": None}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": [{"title": "a"}]}, "documents[0]"),
        ({"top_n": 0}, "top_n"),
        ({"return_documents": "yes"}, "return_documents"),
    ],
)
def test_what_is_wrong_with_a_ranking_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_rerank({"model": RERANK, "query": "q", "documents": ["a"], **change})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("operation", "target", "expected"),
    [
        (Operation.EMBED, "auto", f"{EMBED}/**"),
        (Operation.RERANK, "auto", f"{RERANK}/**"),
        (Operation.EMBED, EMBED, EMBED),
        (
            Operation.EMBED,
            "data.gpt/x",
            "data.gpt/x",
        ),  # nobody embeds under it, and it is not fetched
        (Operation.RERANK, "knowledge.gpt/x", "knowledge.gpt/x"),
    ],
)
def test_an_operation_on_vectors_stays_one_whatever_the_name(
    operation: Operation, target: str, expected: str
) -> None:
    body: dict[str, Value] = {"query": "17 + 25", "documents": ["a"], "input": ["17 + 25"]}
    [step] = plan(Ask(target, operation, body, "r"), ()).steps
    assert (step.subtask.name, step.subtask.operation) == (expected, operation)
    wanted = ("query", "documents") if operation is Operation.RERANK else ("input",)
    assert all(step.body[name] == body[name] for name in wanted)


def test_a_model_is_found_by_its_family_under_any_kind_of_name() -> None:
    class Catalogue:
        def capabilities(self) -> list[dict[str, Value]]:
            def row(name: str, model: str, *operations: str) -> dict[str, Value]:
                return {"name": name, "model": model, "operations": list(operations)}

            return [
                row(EMBED, "MiniLM", "embed"),
                row("knowledge.gpt/general", "SmolLM2", "chat"),
                row(RERANK, "Both", "rerank"),
                row("knowledge.gpt/both", "Both", "rerank"),
            ]

    models = Models(Catalogue())  # type: ignore[arg-type]
    assert models.target_for("MiniLM", Operation.EMBED) == "computation.gpt/**?model=MiniLM"
    assert models.target_for("SmolLM2") == "knowledge.gpt/**?model=SmolLM2"
    assert models.target_for("Both", Operation.RERANK) == "knowledge.gpt/**?model=Both"
    assert models.target_for("auto", Operation.EMBED) == "auto"
    with pytest.raises(RequestError, match="MiniLM"):
        models.target_for("MiniML", Operation.EMBED)


def test_texts_are_expected_to_take_their_tokens_and_no_answer() -> None:
    def demand(operation: Operation, body: dict[str, Value]) -> Demand:
        return demand_of(Request("r", EMBED, operation, body))

    assert demand(Operation.EMBED, {"input": ["a" * 400, "b" * 400]}) == Demand(201, 0)
    few: dict[str, Value] = {"query": "q" * 400, "documents": ["a" * 400]}
    many: dict[str, Value] = {"query": "q" * 400, "documents": ["a" * 400] * 10}
    assert demand(Operation.RERANK, few) == Demand(201, 0)
    assert demand(Operation.RERANK, many) == Demand(2001, 0)


def test_a_peer_that_embeds_for_others_already_takes_longer() -> None:
    offers = [offer(number, EMBED, decode=10.0, slots=32) for number in (1, 2)]
    views = [
        View(Candidate(one, Match.EXACT, 0, one.weight, 0.0, False), Load(busy), round_trip_s=0.001)
        for one, busy in zip(offers, (6, 0), strict=True)
    ]
    ordered = ExpectedTimePolicy().order(views, Demand(1000, 0), Random(1))
    assert [ranked.view.candidate.offer for ranked in ordered] == offers[::-1]
    assert ordered[1].total_s > 6 * ordered[0].total_s
