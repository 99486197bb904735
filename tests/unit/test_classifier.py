"""The classifier: a floor on the committed prompts, what it must never do, and names of data objects."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bench.bench_splitting import DATA_NAMES, labelled, measure

from meshd.orchestrate.classifier import (
    ARITHMETIC,
    CLAUSES_MAX,
    GENERAL,
    QUESTION_CHARS_MAX,
    Classification,
    Need,
    classify,
)
from meshd_naming import parse_query
from meshd_plugins.api import Operation
from meshd_plugins.expressions import is_expression

PIECES = (
    "Write a line about the sea",
    "compute 37 * 43",
    "what is 2+2",
    "who wrote Hamlet",
    "Show me the shelf handbook",
    "fetch data.gpt/network/plan",
    "First work out 250 * 4",
    "it",
    "please",
    "3.5",
    "tell me about whales",
    "Multiply 12 by 9",
)
LINKS = (" and ", ". ", ", and then ", "; ", "? Also, ", " plus ", "\n", "  ,  ", " ", "! Then ")
questions = st.lists(st.sampled_from(PIECES + LINKS), min_size=1, max_size=12).map("".join)
names = st.lists(st.sampled_from((*DATA_NAMES, "data.gpt/a", "data.gpt/-/_")), unique=True)
_LEFT_OUT = re.compile(
    r"(?:[\s.?!;,]|\b(?:and|then|also|plus|finally|next|besides|please|first|firstly|secondly)\b)*",
    re.IGNORECASE,
)


def test_on_the_committed_prompts_no_split_is_false_and_few_are_missed() -> None:
    figures = measure()
    assert figures.precision == 1.0
    assert figures.recall >= 0.9
    assert figures.right_parts >= figures.prompts - 1


@pytest.mark.parametrize("prompt", [prompt for _, prompt in labelled()])
def test_split_off_keeps_every_prompt_whole(prompt: str) -> None:
    assert len(classify(prompt, DATA_NAMES, split=False).parts) == 1


def check(text: str, found: Classification) -> None:
    """What is true of every classification."""
    assert found.parts
    place = 0
    for part in found.parts:
        assert part.reason
        match part.need:
            case Need.CALCULATOR:
                assert part.name == ARITHMETIC
                assert is_expression(part.text)
            case Need.DATA:
                assert part.operation is Operation.FETCH
                assert parse_query(part.name).kind == "data"
            case Need.MODEL:
                assert part.name == GENERAL
        begin = text.index(part.text, place)
        left_out = text[place:begin]
        assert _LEFT_OUT.fullmatch(left_out), left_out
        place = begin + len(part.text)
    assert _LEFT_OUT.fullmatch(text[place:])
    assert found.compound == (len(found.parts) > 1)
    if found.compound:
        needs = [part.need for part in found.parts]
        assert needs != [Need.MODEL] * len(needs)
        assert (Need.MODEL, Need.MODEL) not in pairwise(needs)


@settings(max_examples=100, deadline=None)
@given(questions, names)
def test_parts_cover_the_question_in_order(text: str, known: list[str]) -> None:
    check(text, classify(text, known))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.lists(st.text(max_size=20), max_size=3))
def test_any_text_and_any_names_are_classified(text: str, known: list[str]) -> None:
    known = [f"data.gpt/{name}" for name in known]
    check(text, classify(text, known))


@pytest.mark.parametrize(
    "text",
    [
        " " * QUESTION_CHARS_MAX,
        "a" + " " * (QUESTION_CHARS_MAX - 2) + "b",
        ("and " * QUESTION_CHARS_MAX)[:QUESTION_CHARS_MAX],
        ("x and please " * QUESTION_CHARS_MAX)[:QUESTION_CHARS_MAX],
        ("1+" * QUESTION_CHARS_MAX)[: QUESTION_CHARS_MAX - 1],
        ("Compute 1+1. " * QUESTION_CHARS_MAX)[:QUESTION_CHARS_MAX],
        "What is 2+2? " * QUESTION_CHARS_MAX,
    ],
)
def test_hostile_texts_stay_whole(text: str) -> None:
    assert len(classify(text).parts) == 1


def test_more_clauses_than_the_bound_stay_whole() -> None:
    assert len(classify("Compute 1+1. " * CLAUSES_MAX).parts) == CLAUSES_MAX
    assert len(classify("Compute 1+1. " * (CLAUSES_MAX + 1)).parts) == 1


def test_a_calculation_is_handed_on_as_the_calculator_reads_it() -> None:
    parts = classify("First work out 250 * 4, then suggest a name for a cat.").parts
    assert [part.text for part in parts] == ["work out 250 * 4", "suggest a name for a cat."]


def test_neighbouring_requests_to_a_model_stay_as_they_were_written() -> None:
    parts = classify("Compute 1+1. Who wrote Hamlet? Tell me about whales!").parts
    assert [part.text for part in parts] == [
        "Compute 1+1",
        "Who wrote Hamlet? Tell me about whales!",
    ]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("data.gpt/shelf/handbook", "data.gpt/shelf/handbook"),
        ("Fetch data.gpt/other/thing, please", "data.gpt/other/thing"),
        ("Summarise data.gpt/shelf/handbook", "data.gpt/shelf/handbook"),
        ("Show me the shelf handbook", "data.gpt/shelf/handbook"),
        ("What does the network plan say?", "data.gpt/network/plan"),
        ("Get me ideas for a network plan", None),
        ("Show me how to write a handbook for a shelf", None),
        ("Give me a poem", None),
        ("Explain what data.gpt/somebody/else stands for", None),
        ("Fetch data.gpt/a//b", None),
        ("What is data.gpt/?", None),
    ],
)
def test_a_data_object_is_asked_for_by_name_or_by_its_words_alone(
    text: str, name: str | None
) -> None:
    [part] = classify(text, DATA_NAMES).parts
    assert (part.name if part.need is Need.DATA else None) == name


def test_of_two_objects_that_fit_the_more_exact_one_is_meant_and_of_equals_none() -> None:
    known = ["data.gpt/plan", "data.gpt/network/plan", "data.gpt/plan/network"]
    assert classify("Show the network plan", known[:2]).parts[0].name == known[1]
    assert classify("Show the network plan", known).parts[0].need is Need.MODEL
    assert classify("Give me a plan", ["data.gpt/-"]).parts[0].need is Need.MODEL
