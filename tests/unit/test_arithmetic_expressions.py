# ruff: noqa: RUF001 (the typographic signs are what is tested)
"""Reading expressions: questions as a whole, and expressions inside prose."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd_plugins.expressions import (
    LENGTH_MAX,
    Binary,
    Call,
    ExpressionError,
    Negate,
    Node,
    Number,
    Percent,
    find_expressions,
    is_expression,
    parse_expression,
    parse_question,
    render,
)

QUESTIONS = {
    "17 + 25": "17 + 25",
    "What is 17 + 25?": "17 + 25",
    "what's 15% of 80": "15% of 80",
    "17 times 25": "17 * 25",
    "17 x 25": "17 * 25",
    "3x4": "3 * 4",
    "17 × 25 ÷ 5": "17 * 25 / 5",
    "5 − 3": "5 - 3",
    "2**10": "2^10",
    "2²": "2^2",
    "square root of 144": "sqrt(144)",
    "the square root of 16 plus 9": "sqrt(16) + 9",
    "√2 * 3": "sqrt(2) * 3",
    "10!": "10!",
    "10 factorial": "10!",
    "7 squared": "7^2",
    "2 to the power of 8": "2^8",
    "100 divided by 8": "100 / 8",
    "10 % 3": "10 mod 3",
    "10 mod 3": "10 mod 3",
    "2(3 + 4)": "2 * (3 + 4)",
    "1,234,567 + 1": "1234567 + 1",
    "0x10 + 1": "16 + 1",
    ".5 + 1": "0.5 + 1",
    "gcd(100,200)": "gcd(100, 200)",
    "max(3, 4, 5)": "max(3, 4, 5)",
    "min(3,4)": "min(3, 4)",
    "the sum of 3, 4, and 5": "sum(3, 4, 5)",
    "subtract 4 from 10": "10 - 4",
    "add 3 and 4": "3 + 4",
    "multiply 3 by 4": "3 * 4",
    "divide 10 by 4": "10 / 4",
    "half of 10": "1 / 2 of 10",
    "twice 21": "2 * 21",
    "twenty-five times two hundred and five": "25 * 205",
    "Please compute 3 + 4, thank you.": "3 + 4",
    "what is the result of 3 + 4 =": "3 + 4",
    "3 hours 20 minutes in seconds": "3 hours 20 minutes in seconds",
    "3 hours and 20 minutes in seconds": "3 hours 20 minutes in seconds",
    "12 km + 350 m in miles": "12 km + 350 m in miles",
    "convert 100 F to C": "100 F in C",
    "100 degrees Fahrenheit in Celsius": "100 Fahrenheit in Celsius",
    "how many miles is 12 km?": "12 km in miles",
    "How many seconds are there in 3 hours 20 minutes?": "3 hours 20 minutes in seconds",
    "how many cm in a metre": "1 metre in cm",
    "5 in to cm": "5 in in cm",
    "60 mph in km/h": "60 mph in km/h",
    "20 square feet in m²": "20 feet^2 in m^2",
    "-2^2": "-2^2",
    "2^-3": "2^-3",
    "2^3^2": "2^3^2",
    "(2^3)^2": "(2^3)^2",
    "10 - (4 - 3)": "10 - (4 - 3)",
}


@pytest.mark.parametrize(("text", "normalised"), QUESTIONS.items())
def test_a_question_is_read_whole(text: str, normalised: str) -> None:
    node = parse_question(text)
    assert render(node) == normalised
    assert parse_expression(normalised) == node


REJECTED = [
    ("How many apples does Tom have if he has 3 and eats 2?", "not_arithmetic", 10),
    ("What is the capital of France?", "not_arithmetic", 0),
    ("17 + 25 bananas", "not_arithmetic", 9),
    ("what is not 5 + 3", "not_arithmetic", 9),
    ("write a poem", "not_arithmetic", 0),
    ("", "not_arithmetic", 0),
    ("(((", "not_arithmetic", 0),
    ("5 +", "bad_expression", 4),
    ("5 + * 3", "bad_expression", 5),
    ("(5 + 3", "bad_expression", 7),
    ("5 + 3)", "bad_expression", 6),
    ("2 3", "bad_expression", 3),
    ("1 + 1 = 2", "bad_expression", 7),
    ("$5 + 3", "bad_expression", 1),
    ("5 of 3", "bad_expression", 3),
    ("5!!", "ambiguous", 3),
    ("1e999999 + 1", "bad_expression", 1),
    ("3.1.2 + 1", "bad_expression", 1),
    ("round(1, 2, 3)", "bad_expression", 1),
    ("(" * 100 + "1" + ")" * 100, "too_large", 62),
    ("1" * (LENGTH_MAX + 1), "too_large", 0),
]


@pytest.mark.parametrize(("text", "code", "column"), REJECTED)
def test_what_is_not_understood_says_where(text: str, code: str, column: int) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse_question(text)
    assert (caught.value.code, caught.value.column) == (code, column), caught.value.message
    assert not is_expression(text)


FOUND = {
    "Write a short poem about the sea and compute 37 * 43.": [("37 * 43", "compute")],
    "What is 12 - 5? And who wrote Faust?": [("12 - 5", "what is")],
    "Explain gravity. Also calculate the square root of 144": [("sqrt(144)", "calculate the")],
    "tell me a joke, then what's 15% of 80?": [("15% of 80", "what's")],
    "What is the capital of France and what is 12 divided by 4?": [("12 / 4", "what is")],
    "Convert 10 miles to km and name a river": [("10 miles in km", "convert")],
    "Name a river and work out 3/4 of 20": [("3 / 4 of 20", "work out")],
    "37 * 43 - and be quick": [("37 * 43", "")],
    "add 3 and 4 then sing": [("3 + 4", "add")],
    "Wow, 5 + 5!": [("5 + 5", "")],
    "compute 5!": [("5!", "compute")],
    "17 - 5": [("17 - 5", "")],
    "24/7": [("24 / 7", "")],
    "Is 3 * 4 more than 2 + 9?": [("3 * 4", ""), ("2 + 9", "")],
    "Tell a tale, and please compute (3/7 + 2/7) * 21": [("(3 / 7 + 2 / 7) * 21", "please compute")],
    "how many seconds are in 3 hours 20 minutes, and who was Bach?": [("3 hours 20 minutes in seconds", "how many")],
    "Name a poet. How many miles is 12 km?": [("12 km in miles", "how many")],
    "3 + 4 in total": [("3 + 4", "")],
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FOUND.items())
def test_an_expression_in_prose_is_found(text: str, expected: list[tuple[str, str]]) -> None:
    spans = find_expressions(text)
    assert [(span.expression, span.cue) for span in spans] == expected
    for span in spans:
        assert span.cue_start <= span.start < span.end <= len(text)
        parse_expression(span.expression)


def test_a_span_says_where_the_expression_and_its_cue_are() -> None:
    text = "Write a short poem about the sea and compute 37 * 43."
    [span] = find_expressions(text)
    assert text[span.start : span.end] == "37 * 43"
    assert text[span.cue_start : span.start] == "compute "


@pytest.mark.parametrize(
    "text",
    [
        "In 1969 men landed on the moon",
        "my phone is 555-1234",
        "call +1 (555) 123-4567",
        "version 3.11 - beta",
        "python 3.11.2 or 3.12.0",
        "10.0.0.1 - 10.0.0.5",
        "on 2024-01-15 or 1/2/2024",
        "1920x1080 screen",
        "a 4 x 4 car",
        "we are open 24/7",
        "World War I, 1914 - 1918",
        "pages 10-20 of the book",
        "the ratio is 3 to 4",
        "30% of 2020 voters",
        "half of the people",
        "I ran 10 km in 2 hours",
        "I did it two times three days ago",
        "solve x + 3 * 4",
        "2x + 3 = 7",
        "C++ 11 + boost",
        "* 17\n* 25",
        "3 + years of experience",
        "see §3 and §4",
        "file_2*3.txt",
        "https://example.org/1+2",
        "the answer is 42",
        "how many cups are in the cupboard",
        "how many cups do 3 people need",
        "he is 12 and she is 14",
        "a 1-2 victory",
        "",
    ],
)
def test_prose_with_numbers_is_no_arithmetic(text: str) -> None:
    assert find_expressions(text) == ()
    assert not is_expression(text)


def _calls(name: str, inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return inner.map(lambda operand: Call(name, (operand,)))


NUMBERS: st.SearchStrategy[Node] = st.integers(0, 999).map(lambda n: Number(Fraction(n), str(n)))
TREES: st.SearchStrategy[Node] = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.builds(Binary, st.sampled_from(["+", "-", "*", "/", "mod", "^"]), inner, inner),
        inner.map(Negate),
        inner.map(Percent),
        _calls("sqrt", inner),
        _calls("gcd", inner),
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_what_is_written_is_read_back_the_same(tree: Node) -> None:
    assert parse_expression(render(tree)) == tree


PIECES = st.sampled_from(
    ["1", "23", "4.5", "+", "-", "*", "/", "^", "%", "!", "(", ")", "of", "in", "km", "m", "what is", "two", "hundred", "and", "half",
     "square root of", "=", "?", ",", "to", "x", "²", "°C", "poem", "sum of", "divide", "by", "per", "\n", "a", "-"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map(" ".join), st.lists(PIECES, max_size=25).map("".join)))  # fmt: skip
def test_any_text_is_read_or_rejected_and_never_breaks(text: str) -> None:
    node, refusal = None, None
    try:
        node = parse_question(text)
    except ExpressionError as error:
        refusal = error
    if refusal is not None:
        assert refusal.message
        assert 0 <= refusal.column <= len(text) + 1
    if node is not None:
        assert parse_expression(render(node)) == node
    end = 0
    for span in find_expressions(text):
        assert end <= span.start < span.end <= len(text)
        end = span.end
        parse_expression(span.expression)


@pytest.mark.parametrize(
    "unit", ["(", "1+", "-", "2^", "square root of ", "(1+", "1 km ", "sum of "]
)
def test_long_texts_are_searched_to_the_end(unit: str) -> None:
    """A text that is read anew from each of its places would take minutes here."""
    text = unit * (9_900 // len(unit)) + "\ncompute 3 * 4"
    assert find_expressions(text)[-1].expression == "3 * 4"
