"""From a question to a plan: which names, which operations, in which order.

A plan is a DAG of subtasks. Today two strategies make one: `single` and `decompose` (independent parts,
run side by side, joined in the order in which they were asked). More come as modules of their own; the
executor runs whatever DAG it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from meshd.orchestrate.classifier import GENERAL, Need, Part, classify
from meshd.orchestrate.events import Ask, PlannedSubtask
from meshd.orchestrate.modalities import UNSUPPORTED_MODALITY, needed_by, words
from meshd_naming import Kind, parse_query
from meshd_plugins.api import BadRequest, Operation, Value

AUTO = "auto"
ANY_OF: Mapping[Operation, str] = {
    Operation.EMBED: "computation.gpt/embed/**",
    Operation.RERANK: "computation.gpt/rerank/**",
}
"""What `auto` means for operations that do not ask for the meaning of a text (decision 0027)."""
ANYBODY = "knowledge.gpt/**"
"""Who else may answer about an image or a sound when no general model takes it in."""
_ASKING = ("messages", "prompt", "input")  # body fields that hold the question itself
# Fields that ask for what no calculation and no document has, and what two answers joined would not be.
_MODELS_ONLY = ("tools", "response_format", "grammar", "logprobs")


@dataclass(frozen=True, slots=True)
class Step:
    """A subtask with all that is needed to run it."""

    subtask: PlannedSubtask
    body: Mapping[str, Value]
    fallback: Step | None = None  # run instead when the capability says the task is not for it


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done for one ask."""

    strategy: str
    reason: str
    steps: tuple[Step, ...]


def plan(ask: Ask, data_names: Sequence[str]) -> Plan:
    """Decide what an ask needs.

    Args:
        ask: as it came in.
        data_names: the data objects that the mesh holds now.

    Raises:
        meshd_naming.NamingError: the target is neither `auto` nor a name.
        BadRequest: there is nothing to answer.
    """
    if ask.target != AUTO:
        return _by_name(ask, "asked by name")
    if (name := ANY_OF.get(ask.operation)) is not None:
        return _by_name(replace(ask, target=name), f"somebody who can {ask.operation}")
    if needed := needed_by(ask.body):
        return _of_media(ask, needed)
    if any(ask.body.get(field) for field in _MODELS_ONLY):
        return _by_name(replace(ask, target=GENERAL), "only a language model answers in this form")
    question = question_of(ask.body)
    if not question.strip():
        raise BadRequest("there is no question in the request: 'auto' needs one to choose a name")
    one_turn = _user_turns(ask.body) <= 1  # a part would lose what was said before
    found = classify(question, data_names, split=ask.split and one_turn)
    steps = tuple(
        _step(f"t{index}", part, ask, whole=not found.compound)
        for index, part in enumerate(found.parts, 1)
    )
    return Plan("decompose" if found.compound else "single", found.reason, steps)


def question_of(body: Mapping[str, Value]) -> str:
    """The text that is asked: the last user message, the prompt, or the input; "" if there is none."""
    messages = body.get("messages")
    if isinstance(messages, Sequence) and not isinstance(messages, str | bytes):
        for message in reversed(messages):
            if isinstance(message, Mapping) and message.get("role") == "user":
                return _content_text(message.get("content"))
        return ""
    for key in ("prompt", "input"):
        value = body.get(key)
        if isinstance(value, str):
            return value
    return ""


def operation_for(name: str, wanted: Operation) -> Operation:
    """The operation that a name's kind takes, whatever API the request came by."""
    if wanted in ANY_OF:  # an answer in words would be none, whoever gives it
        return wanted
    match parse_query(name).kind:
        case Kind.DATA:
            return Operation.FETCH
        case Kind.COMPUTATION:
            return Operation.RUN
        case Kind.KNOWLEDGE:
            return Operation.CHAT if wanted is Operation.RUN else wanted


def body_for(operation: Operation, body: Mapping[str, Value], question: str) -> dict[str, Value]:
    """The body that an operation takes, from one of another: sampling parameters are kept."""
    rest = {key: value for key, value in body.items() if key not in _ASKING}
    match operation:
        case Operation.FETCH | Operation.TUNNEL:
            return {}
        case Operation.RUN:
            return {**rest, "input": body.get("input", question)}
        case Operation.CHAT if "messages" in body:
            return dict(body)
        case Operation.CHAT:
            return {**rest, "messages": [{"role": "user", "content": question}]}
        case Operation.COMPLETE:
            return {**rest, "prompt": body.get("prompt", question)}
        case Operation.EMBED:
            return {**rest, "input": body.get("input", question)}
        case Operation.RERANK:
            return dict(body)


def _by_name(ask: Ask, reason: str) -> Plan:
    operation = operation_for(ask.target, ask.operation)
    if operation is not Operation.CHAT and (needed := needed_by(ask.body)):
        raise BadRequest(
            f'"{ask.target}" does not take in {words(needed)}; models do: "auto" finds one',
            code=UNSUPPORTED_MODALITY,
        )
    question = question_of(ask.body)
    subtask = PlannedSubtask("t1", ask.target, operation, question)
    step = Step(subtask, body_for(operation, ask.body, question))
    return Plan("single", reason, (step,))


def _of_media(ask: Ask, needed: Sequence[str]) -> Plan:
    """One part, whatever the text says: what is shown or heard may matter to all of it."""
    question = question_of(ask.body)
    operation = operation_for(GENERAL, ask.operation)
    anybody = Step(PlannedSubtask("t1", ANYBODY, operation, question), ask.body)
    step = Step(PlannedSubtask("t1", GENERAL, operation, question), ask.body, anybody)
    return Plan("single", f"only a model takes in {words(needed)}", (step,))


def _step(identity: str, part: Part, ask: Ask, *, whole: bool) -> Step:
    body = ask.body if whole else _narrowed(ask.body, part.text)
    match part.need:
        case Need.DATA:
            return Step(PlannedSubtask(identity, part.name, part.operation, part.text), {})
        case Need.MODEL:
            return _asking_a_model(identity, ask, body, part.text)
        case Need.CALCULATOR:
            # It gets the sum as the classifier read it, alone: no earlier turn changes what it is.
            sum_asked = body_for(part.operation, _narrowed(ask.body, part.text), part.text)
            subtask = PlannedSubtask(identity, part.name, part.operation, part.text)
            return Step(subtask, sum_asked, _asking_a_model(identity, ask, body, part.text))


def _asking_a_model(identity: str, ask: Ask, body: Mapping[str, Value], text: str) -> Step:
    operation = operation_for(GENERAL, ask.operation)
    subtask = PlannedSubtask(identity, GENERAL, operation, text)
    return Step(subtask, body_for(operation, body, text))


def _narrowed(body: Mapping[str, Value], text: str) -> dict[str, Value]:
    """The same request about one part only; a system message stays."""
    rest = {key: value for key, value in body.items() if key not in _ASKING}
    messages = body.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        return {**rest, "prompt" if "prompt" in body else "input": text}
    system = [
        message
        for message in messages
        if isinstance(message, Mapping) and message.get("role") in {"system", "developer"}
    ]
    return {**rest, "messages": [*system, {"role": "user", "content": text}]}


def _user_turns(body: Mapping[str, Value]) -> int:
    messages = body.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        return 1
    return sum(isinstance(each, Mapping) and each.get("role") == "user" for each in messages)


def _content_text(content: Value) -> str:
    """Text of a message's content: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))
