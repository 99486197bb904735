"""Grammars are read as llama.cpp reads them, and what it could not handle is refused first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.support_walker import Walker

from meshd_plugins.builtin.llama.prompt.gbnf import (
    GRAMMAR_BYTES_MAX,
    Chars,
    GrammarError,
    inverted,
    merged,
    parse,
)
from meshd_plugins.builtin.llama.prompt.gbnf_check import check


def texts(grammar: str, count: int = 300) -> set[str]:
    walker, chance = Walker(parse(grammar)), random.Random(1)
    return {walker.walk(chance, long=12) for _ in range(count)}


@pytest.mark.parametrize(
    ("grammar", "described"),
    [
        ('root ::= "a" | "b" "c"', {"a", "bc"}),
        ("root ::= x{2}  # twice\nx ::= [ab]", {"aa", "ab", "ba", "bb"}),
        ('root ::= "a"{1,3}', {"a", "aa", "aaa"}),
        ('root ::= ("a" | "b")? "c"', {"c", "ac", "bc"}),
        ('root ::= "x" (\n  "y"\n  | "z"\n)', {"xy", "xz"}),
        (r'root ::= "\x41\u00e9\n\\\"" [\]\[-]', {'Aé\n\\"]', 'Aé\n\\"[', 'Aé\n\\"-'}),
        ('root ::= "a" b\nb ::= ""', {"a"}),
        ('other-1 ::= "q"\nroot ::= other-1 other-1', {"qq"}),
    ],
)
def test_what_a_grammar_describes(grammar: str, described: set[str]) -> None:
    assert texts(grammar) == described


def test_repetitions_without_end() -> None:
    found = texts('root ::= "a"+ "b"* "c"{2,}')
    assert {text.strip("a").strip("b").strip("c") for text in found} == {""}
    assert min(map(len, found)) == 3
    assert len(found) > 10


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("", "no rule 'root'"),
        ('rot ::= "a"', "no rule 'root'"),
        ("root ::= x", "no rule 'x'"),
        ('root = "a"', "line 1: '::=' is missing"),
        ('root ::= "a"\nx ::= "b', "line 2: a string has no end"),
        ('root ::= ("a"', r"'\)' is missing"),
        ('root ::= "a" )', "ends with its line"),
        ("root ::= [a", "ends in the middle"),
        ("root ::= [z-a]", "wrong way round"),
        ("root ::= *", "nothing stands before"),
        ('root ::= "a"{3,2}', "wrong way round"),
        ('root ::= "a"{2001}', "repetitions is from 0 to 2000"),
        ('root ::= "a"{99999999999999999999}', "repetitions is from 0 to 2000"),
        ('root ::= "\\q"', "unknown escape"),
        ('root ::= "\\x4"', "unknown escape"),
        ('root ::= "\0"', "a character that no text holds"),
        ("root ::= <think>", "tokens as parts"),
        (f'root ::= {"(" * 40}"a"{")" * 40}', "within each other"),
        (f'root ::= "{"a" * GRAMMAR_BYTES_MAX}"', "bytes"),
        (
            "root ::= ((([a-z]{500}){0,500}) x)\nx ::= ([a-z]{0,1000} | [0-9]{0,2000}){0,999}" * 30,
            "too large|ends with",
        ),
    ],
)
def test_a_malformed_grammar_says_where_and_why(grammar: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        parse(grammar)


FORTY = [f"a{n} ::= a{n + 1} | a{n + 1}" for n in range(40)]
MIXED = [f'a{n} ::= a{n + 1} "x" | a{n + 1} "y"' for n in range(40)]


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('root ::= root "a" | "b"', "recurses to the left"),
        ('root ::= a? root "x" | "y"\na ::= "q"', "recurses to the left"),
        ('root ::= "a" root', "no finite text"),
        ("root ::= [a-z] root | [0-9] root", "no finite text"),
        ("\n".join(["root ::= a0", *FORTY, 'a40 ::= "x"']), "too ambiguous"),
        ("\n".join(["root ::= a0", *MIXED, 'a40 ::= "x"']), "too ambiguous"),
        ('root ::= x\nx ::= [a-z] x | [a-z] x | ""', "too ambiguous"),
        ('root ::= x\nx ::= "-" x "b" | "-" x "c" | ""', "too ambiguous"),
        ('root ::= [a-z]* [a-z]* [a-z]* [a-z]* [a-z]* "x"', "too ambiguous"),
        ('root ::= ([a-z]+)+ "!"', "too ambiguous"),
        (f"root ::= {'[a-z]? ' * 200}", "too ambiguous"),
    ],
)
def test_what_would_take_llama_cpp_for_ever_is_refused(grammar: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        check(parse(grammar))


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= [a-z ]* "end"',
        'root ::= ws "a" ws ws "b"\nws ::= [ \\t\\n]*',
        'root ::= "(" root ")" | [0-9]+',
        'root ::= item ("," item)*\nitem ::= "a" | "ab" | "abc"',
        "root ::= [0-9]{1,2000}",
    ],
)
def test_what_people_write_passes(grammar: str) -> None:
    check(parse(grammar))


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(RANGES)
def test_sets_of_characters(drawn: list[tuple[int, int]]) -> None:
    inside = {point for low, size in drawn for point in range(low, low + size + 1)}
    ranges = merged([(low, low + size) for low, size in drawn])
    outside = inverted(ranges)
    for point in range(80):
        assert any(low <= point <= high for low, high in ranges) == (point in inside)
        assert any(low <= point <= high for low, high in outside) == (point not in inside)
    assert inverted(outside) == ranges


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='root:= "ab|()[]{}*+?\\^-0123,#\n<!.', max_size=40))
def test_no_text_does_more_than_be_refused(noise: str) -> None:
    try:
        grammar = parse(f"root ::= {noise}")
        check(grammar)
    except GrammarError:
        return
    assert all(isinstance(e, Chars | int) for rule in grammar.rules for s in rule for e in s)
