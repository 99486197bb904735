"""Plans: names, operations and bodies of each step, and what is done when a name was given."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.orchestrate.classifier import ARITHMETIC, GENERAL
from meshd.orchestrate.events import Ask
from meshd.orchestrate.planner import AUTO, Plan, body_for, plan, question_of
from meshd_naming import NamingError
from meshd_plugins.api import BadRequest, CapabilityError, Operation, Value

TWO = "Write a line about the sea, and compute 37 * 43."
HANDBOOK = "data.gpt/shelf/handbook"
SYSTEM: Value = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, Value]:
    return {"role": "user", "content": text}


def ask(
    body: dict[str, Value],
    target: str = AUTO,
    operation: Operation = Operation.CHAT,
    *,
    split: bool = True,
) -> Ask:
    return Ask(target, operation, body, "r-1", split=split)


def chat(*messages: Value, **rest: Value) -> dict[str, Value]:
    return {"messages": list(messages), **rest}


def names(found: Plan) -> list[tuple[str, Operation]]:
    return [(step.subtask.name, step.subtask.operation) for step in found.steps]


def test_a_compound_question_becomes_steps_with_their_part_of_it() -> None:
    found = plan(ask(chat(SYSTEM, user(TWO), max_tokens=32)), ())
    assert found.strategy == "decompose"
    assert names(found) == [(GENERAL, Operation.CHAT), (ARITHMETIC, Operation.CHAT)]
    assert [step.subtask.id for step in found.steps] == ["t1", "t2"]
    assert found.steps[0].body == chat(SYSTEM, user("Write a line about the sea"), max_tokens=32)
    assert found.steps[1].body["messages"] == [SYSTEM, user("compute 37 * 43.")]


def test_a_calculation_can_fall_back_on_a_model_and_nothing_else_does() -> None:
    first, second = plan(ask(chat(user(TWO))), ()).steps
    assert first.fallback is None
    assert second.fallback is not None
    assert second.fallback.subtask.name == GENERAL
    assert second.fallback.subtask.id == second.subtask.id
    assert second.fallback.body["messages"] == [user("compute 37 * 43.")]


def test_a_calculation_is_read_alone_and_its_fallback_sees_the_whole_conversation() -> None:
    earlier = (user("Hello"), {"role": "assistant", "content": "Hi"})
    body = chat(*earlier, user("First compute 2 + 2"))
    [step] = plan(ask(body), ()).steps
    assert step.body["messages"] == [user("compute 2 + 2")]
    assert step.fallback is not None
    assert step.fallback.body == body


def test_a_conversation_is_not_split() -> None:
    body = chat(user("Hello"), {"role": "assistant", "content": "Hi"}, user(TWO))
    found = plan(ask(body), ())
    assert (found.strategy, names(found)) == ("single", [(GENERAL, Operation.CHAT)])
    assert found.steps[0].body == body


def test_nothing_is_split_when_the_caller_says_so() -> None:
    assert len(plan(ask(chat(user(TWO)), split=False), ()).steps) == 1


def test_data_is_fetched_with_an_empty_body() -> None:
    [step] = plan(ask(chat(user("Show me the shelf handbook."), max_tokens=5)), (HANDBOOK,)).steps
    assert (step.subtask.name, step.subtask.operation, step.body) == (
        HANDBOOK,
        Operation.FETCH,
        {},
    )


def test_a_prompt_to_complete_stays_one_for_a_model_and_is_a_question_for_the_calculator() -> None:
    poem, total = plan(ask({"prompt": TWO, "top_p": 0.5}, operation=Operation.COMPLETE), ()).steps
    assert poem.subtask.operation is Operation.COMPLETE
    assert poem.body == {"prompt": "Write a line about the sea", "top_p": 0.5}
    assert total.body == {"messages": [user("compute 37 * 43.")], "top_p": 0.5}


def test_auto_finds_somebody_who_embeds_whatever_the_text() -> None:
    for value in ("17 + 25", ["a", "b"]):
        found = plan(ask({"input": value}, operation=Operation.EMBED), ())
        assert names(found) == [("computation.gpt/embed/**", Operation.EMBED)]
        assert found.steps[0].body == {"input": value}


@pytest.mark.parametrize("body", [{}, chat(), chat(SYSTEM), chat(user("  ")), {"prompt": ""}])
def test_auto_needs_a_question(body: dict[str, Value]) -> None:
    with pytest.raises(BadRequest):
        plan(ask(body), ())


@pytest.mark.parametrize(
    ("target", "operation", "body"),
    [
        ("knowledge.gpt/general", Operation.CHAT, chat(user("2 + 2"))),
        ("knowledge.gpt/x?context>=8192", Operation.CHAT, chat(user("2 + 2"))),
        ("computation.gpt/arithmetic", Operation.RUN, {"input": "2 + 2"}),
        (HANDBOOK, Operation.FETCH, {}),
    ],
)
def test_a_name_decides_the_operation_and_the_body(
    target: str, operation: Operation, body: dict[str, Value]
) -> None:
    found = plan(ask(chat(user("2 + 2")), target), ())
    assert (found.strategy, names(found)) == ("single", [(target, operation)])
    assert found.steps[0].body == body


def test_a_question_to_run_is_a_chat_for_knowledge() -> None:
    [step] = plan(ask({"input": "Why?"}, GENERAL, Operation.RUN), ()).steps
    assert step.subtask.operation is Operation.CHAT
    assert step.body == {"messages": [user("Why?")]}


@pytest.mark.parametrize("target", ["", "general", "knowledge/x", "knowledge.gpt/X"])
def test_a_malformed_name_is_told(target: str) -> None:
    with pytest.raises(NamingError):
        plan(ask(chat(user("2 + 2")), target), ())


def test_the_question_is_the_last_of_the_user_whatever_form_it_has() -> None:
    parts: Value = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"text": "b"}, 7]
    assert question_of(chat(user("x"), {"role": "user", "content": parts}, SYSTEM)) == "a\nb"
    assert question_of({"messages": "text"}) == ""
    assert question_of({"messages": "text", "prompt": "p"}) == "p"


def test_what_a_request_already_has_is_kept_when_its_body_is_changed() -> None:
    assert body_for(Operation.RUN, {"input": 7, "x": 1}, "") == {"input": 7, "x": 1}
    assert body_for(Operation.COMPLETE, chat(user("a"), x=1), "a") == {"prompt": "a", "x": 1}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("role", "content", "messages", "text", "user")), inner, max_size=3
        )
    ),
    max_leaves=12,
)
bodies = st.dictionaries(st.sampled_from(("messages", "prompt", "input", "x")), values, max_size=4)


@settings(max_examples=100, deadline=None)
@given(bodies, st.sampled_from(Operation), st.sampled_from((AUTO, GENERAL, HANDBOOK)))
def test_any_body_makes_a_plan_or_is_told_to_be_wrong(
    body: dict[str, Value], operation: Operation, target: str
) -> None:
    try:
        found = plan(ask(body, target, operation), (HANDBOOK,))
    except CapabilityError:
        assert target == AUTO
        return
    assert found.steps
    assert found.reason
