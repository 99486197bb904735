"""The exact calculator: values, refusals, and the capability around it."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd_plugins.api import BadRequest, Operation, PluginConfigError, Refused, Value
from meshd_plugins.builtin import arithmetic
from meshd_plugins.builtin.arithmetic import ArithmeticCapability, calculate
from meshd_plugins.builtin.arithmetic.answer import decimal_of, rounded
from meshd_plugins.builtin.arithmetic.evaluate import evaluate
from meshd_plugins.expressions import ExpressionError, parse_expression
from meshd_plugins.testing import (
    Checked,
    FakeCapabilities,
    check_capability,
    fake_context,
    make_request,
)

EXACT = {
    "17 + 25": "42",
    "(3/7 + 2/7) * 21": "15",
    "0.1 + 0.2": "0.3",
    "2^64 - 1": "18446744073709551615",
    "15% of 80": "12",
    "square root of 144": "12",
    "sqrt(1/4)": "0.5",
    "cube root of 27": "3",
    "10!": "3628800",
    "0!": "1",
    "8^(1/3)": "2",
    "8^(2/3)": "4",
    "(-8)^(1/3)": "-2",
    "-2^2": "-4",
    "(-2)^2": "4",
    "2^-3": "0.125",
    "2^3^2": "512",
    "(-1)^1000000001": "-1",
    "1^(10^100)": "1",
    "-7 mod 3": "2",
    "1/3": "1/3",
    "1/8": "0.125",
    "gcd(12, 18)": "6",
    "lcm(4, 6)": "12",
    "mean of 3, 4 and 8": "5",
    "round(2.5)": "3",
    "round(-2.5)": "-3",
    "round(3.14159, 2)": "3.14",
    "floor(-0.5)": "-1",
    "ceil(0.2)": "1",
    "abs(-3)": "3",
    "quotient of 10 and 4": "2.5",
    "difference between 10 and 4": "6",
    "product of 3 and 4": "12",
    "10% + 5%": "0.15",
    "3 hours 20 minutes in seconds": "12000 seconds",
    "5 feet 3 inches in cm": "160.02 cm",
    "12 km + 350 m": "12.35 km",
    "12 km + 350 m in miles": "771875/100584 miles",
    "100 F to C": "340/9 C",
    "-40 C in F": "-40 F",
    "0 °C in K": "273.15 K",
    "60 mph in km/h": "96.56064 km/h",
    "10 km / 500 m": "20",
    "3 m * 20 cm": "0.6 m^2",
    "(5 m)^2": "25 m^2",
    "10 km / 2 h": "5 km/h",
    "1 kWh in J": "3600000 J",
    "1 lb in kg": "0.45359237 kg",
    "1 GiB in MB": "1073.741824 MB",
    "max(3 km, 2 miles)": "2 miles",
    "min(3 km, 2 miles)": "3 km",
}


@pytest.mark.parametrize(("text", "result"), EXACT.items())
def test_values_are_exact(text: str, result: str) -> None:
    answer = calculate(text)
    assert (answer.result, answer.exact) == (result, True)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("sqrt(2)", "1.4142135623730950488"),
        ("2^0.5", "1.4142135623730950488"),
        ("cbrt(2)", "1.2599210498948731648"),
        ("sqrt(2)^2 - 2", "0"),
        ("sqrt(2e-40)", "1.4142135623730950488e-20"),
        ("sqrt(2e100)", "1.4142135623730950488e50"),
        ("1 / sqrt(2)", "0.7071067811865475244"),
        ("-sqrt(2) * sqrt(3)", "-2.4494897427831780982"),
        ("(-2)^(1/3)", "-1.2599210498948731648"),
        ("*".join(["sqrt(2)"] * 101), "1592262918131443.1412"),
        ("+".join(["1/sqrt(3)"] * 90), "51.961524227066318806"),
    ],
)
def test_what_has_no_exact_value_is_marked_and_shows_certain_digits(text: str, result: str) -> None:
    answer = calculate(text)
    assert not answer.exact
    assert answer.result == result
    assert "≈" in answer.text
    assert "=" not in answer.text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("What is 17 + 25?", "17 + 25 = 42"),
        ("1/3", "1 / 3 = 1/3 ≈ 0.33333333333333333333"),
        ("100 F to C", "100 F in C = 340/9 C ≈ 37.777777777777777778 C"),
        ("sqrt 2", "sqrt(2) ≈ 1.4142135623730950488"),
    ],
)
def test_the_line_for_people(text: str, line: str) -> None:
    assert calculate(text).text == line


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("1/0", "undefined", "division by zero"),
        ("5 mod 0", "undefined", "division by zero"),
        ("0^-1", "undefined", "division by zero"),
        ("0^0", "undefined", "0^0"),
        ("1 / (sqrt(2)^2 - 2)", "undefined", "cannot be told from zero"),
        ("sqrt(-4)", "undefined", "even root of a negative"),
        ("(-3)!", "undefined", "negative"),
        ("2.5!", "undefined", "whole number"),
        ("gcd(1.5, 2)", "undefined", "whole number"),
        ("2^(10^9)", "too_large", "about 301,029,996 digits"),
        ("9^9^9", "too_large", "4,000 digits"),
        ("10^10^10^10", "too_large", "4,000 digits"),
        ("100000!", "too_large", "456,57"),
        ("(10^100)!", "too_large", "4,000 digits"),
        ("2^(1/1000)", "too_large", "64th"),
        ("1e3000 * 1e3000", "too_large", "4,000 digits"),
        ("2^sqrt(2)", "undefined", "exponent must be exact"),
        ("100 + 15%", "ambiguous", "100 + 15% of 100"),
        ("5 km + 3 s", "bad_units", "s cannot be added"),
        ("5 km + 3", "bad_units", "a plain number"),
        ("5 km in s", "bad_units", "km cannot be converted to s"),
        ("5 to km", "bad_units", "no unit"),
        ("20 °C + 5 °C", "bad_units", "only be converted"),
        ("-300 C in K", "undefined", "absolute zero"),
        ("sqrt(4 m)", "bad_units", "plain number"),
        ("2^(3 m)", "bad_units", "plain number"),
        ("(5 m)!", "bad_units", "plain number"),
    ],
)
def test_refusals_say_why(text: str, code: str, says: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        calculate(text)
    assert caught.value.code == code
    assert says in caught.value.message


@st.composite
def expressions(draw: st.DrawFn, depth: int = 4) -> tuple[str, Fraction | None]:
    """A fully parenthesised text and its value by Python's own fractions; None where it has none."""
    if depth == 0 or draw(st.booleans()):
        whole, places = draw(st.integers(0, 10_000)), draw(st.integers(0, 3))
        text = f"{whole}.{draw(st.integers(0, 10**places - 1)):0{places}}" if places else str(whole)
        return text, Fraction(text)
    left, left_value = draw(expressions(depth=depth - 1))
    right, right_value = draw(expressions(depth=depth - 1))
    operator = draw(st.sampled_from("+-*/"))
    text = f"({left} {operator} {right})"
    if left_value is None or right_value is None or (operator == "/" and not right_value):
        return text, None
    match operator:
        case "+":
            return text, left_value + right_value
        case "-":
            return text, left_value - right_value
        case "*":
            return text, left_value * right_value
        case _:
            return text, left_value / right_value


@settings(max_examples=100, deadline=None)
@given(expressions())
def test_it_agrees_with_fractions(case: tuple[str, Fraction | None]) -> None:
    text, value = case
    if value is None:
        with pytest.raises(ExpressionError, match="division by zero"):
            evaluate(parse_expression(text))
    else:
        number = evaluate(parse_expression(text)).number
        assert (number.low, number.high) == (value, value)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**30), st.integers(1, 10**30), st.integers(2, 9))
def test_a_root_lies_within_its_interval(above: int, below: int, degree: int) -> None:
    value = Fraction(above, below)
    number = evaluate(parse_expression(f"({above}/{below})^(1/{degree})")).number
    assert number.low**degree <= value <= number.high**degree
    assert number.high - number.low <= Fraction(max(number.high, Fraction(1)), 10**50)


@settings(max_examples=100, deadline=None)
@given(st.fractions(), st.integers(1, 25))
def test_rounding_is_within_half_a_unit_of_the_last_digit(
    value: Fraction, significant: int
) -> None:
    error = abs(Fraction(rounded(value, significant)) - value)
    assert error <= abs(value) * Fraction(1, 2 * 10 ** (significant - 1))


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**20), 10**20), st.integers(0, 40))
def test_a_decimal_is_written_exactly(digits: int, places: int) -> None:
    value = Fraction(digits, 10**places)
    written = decimal_of(value)
    assert written is not None
    assert Fraction(written) == value


OPERATIONS = (Operation.RUN, Operation.CHAT, Operation.COMPLETE)
BODIES: dict[Operation, dict[str, Value]] = {
    Operation.RUN: {"input": "17 + 25"},
    Operation.COMPLETE: {"prompt": "17 + 25"},
    Operation.CHAT: {
        "messages": [
            {"role": "user", "content": "1 + 1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": [{"type": "text", "text": "17 + 25"}]},
        ]
    },
}


def ask(body: dict[str, Value], operation: Operation = Operation.RUN) -> Checked:
    capability = ArithmeticCapability("knowledge.gpt/arithmetic", OPERATIONS)
    return trio.run(check_capability, capability, make_request(operation, body))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_keeps_the_contract_in_every_operation(operation: Operation) -> None:
    checked = ask(BODIES[operation], operation)
    assert checked.text == "17 + 25 = 42"
    assert checked.done.detail == {"expression": "17 + 25", "result": "42", "exact": True}


def test_a_question_with_units_keeps_the_contract_in_its_thread() -> None:
    assert ask({"input": "3 h 20 min in s"}).done.detail["result"] == "12000 s"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=50))
def test_any_text_is_answered_or_a_bad_request(text: str) -> None:
    code = ""
    try:
        assert ask({"input": text}).text
    except BadRequest as error:
        code = error.code
    assert code in {
        "", "not_arithmetic", "bad_expression", "too_large", "undefined", "ambiguous", "bad_units",
    }  # fmt: skip


def test_the_message_has_the_column_the_text_and_an_example() -> None:
    with pytest.raises(BadRequest) as caught:
        ask({"input": "17 + bananas"})
    assert caught.value.code == "not_arithmetic"
    for part in ("'bananas'", "column 6", "'17 + bananas'", "15% of 80"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        (Operation.RUN, {}),
        (Operation.RUN, {"input": 5}),
        (Operation.COMPLETE, {"prompt": None}),
        (Operation.CHAT, {}),
        (Operation.CHAT, {"messages": []}),
        (Operation.CHAT, {"messages": ["hello"]}),
        (Operation.CHAT, {"messages": [{"role": "system", "content": "1 + 1"}]}),
        (Operation.CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ],
)
def test_a_body_without_text_is_a_bad_request(operation: Operation, body: dict[str, Value]) -> None:
    with pytest.raises(BadRequest):
        ask(body, operation)


def test_an_operation_without_text_is_refused() -> None:
    capability = ArithmeticCapability("computation.gpt/arithmetic", (Operation.FETCH,))
    with pytest.raises(Refused) as caught:
        trio.run(check_capability, capability, make_request(Operation.FETCH))
    assert caught.value.code == "unsupported"


def test_the_plugin_registers_both_names_and_has_no_settings(tmp_path: Path) -> None:
    capabilities = FakeCapabilities()
    arithmetic.meshd_register(fake_context("arithmetic", tmp_path, capabilities=capabilities))
    assert [capability.descriptor.name for capability in capabilities.added] == [
        "computation.gpt/arithmetic",
        "knowledge.gpt/arithmetic",
    ]
    with pytest.raises(PluginConfigError, match="digits"):
        arithmetic.meshd_register(fake_context("arithmetic", tmp_path, {"digits": 5}))


def test_the_units_library_is_loaded_by_the_first_unit_and_not_before() -> None:
    code = (
        "import sys\n"
        "from meshd_plugins.builtin.arithmetic import calculate\n"
        "calculate('17 + 25')\n"
        "assert 'pint' not in sys.modules\n"
        "calculate('1 km in m')\n"
        "assert 'pint' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
