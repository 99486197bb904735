"""The grammar: what parses, what it means, and how each fault is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshd_naming import (
    FIELDS,
    BadConstraint,
    BadLabel,
    BadNode,
    BadOperator,
    BadValue,
    Constraint,
    EmptyName,
    FieldType,
    Kind,
    MalformedName,
    MissingSuffix,
    Name,
    NamingError,
    NotBare,
    Operator,
    TooLong,
    UnknownField,
    UnknownKind,
    WildcardNotAllowed,
    parse_capability_name,
    parse_name,
    parse_query,
)
from meshd_naming import errors as naming_errors
from meshd_naming.fields import QUANTISATIONS, SHELL_WORDS
from meshd_naming.grammar import LABELS_MAX, TEXT_CHARS_MAX


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("knowledge.gpt/arithmetic", "knowledge.gpt/arithmetic"),
        ("data.gpt/site-3/log_1.txt", "data.gpt/site-3/log_1.txt"),
        ("knowledge.gpt/math@Pi-4", "knowledge.gpt/math@pi-4"),
        ("knowledge.gpt/math?context>=8k", "knowledge.gpt/math?context>=8000"),
        ("knowledge.gpt/math,context.ge=8Ki", "knowledge.gpt/math?context>=8192"),
        ("knowledge.gpt/a@b,zone=Lab&context.gt=1.5k", "knowledge.gpt/a@b?context>1500&zone=lab"),
        ("knowledge.gpt/a?zone=x,zone=x", "knowledge.gpt/a?zone=x"),
        ("knowledge.gpt/a?tokens_per_s>=0.5", "knowledge.gpt/a?decode_tokens_per_s>=0.5"),
        ("knowledge.gpt/a?price<0.000001", "knowledge.gpt/a?price<0.000001"),
        ("knowledge.gpt/a?quant>=Q4_K-Medium", "knowledge.gpt/a?quant>=q4_k_m"),
        ("knowledge.gpt/a?x_pages.ge=3", "knowledge.gpt/a?x_pages>=3"),
        ("knowledge.gpt/a?parameters<=7b", "knowledge.gpt/a?parameters<=7000000000"),
        ("knowledge.gpt/a?model!=SmolLM2-135M", "knowledge.gpt/a?model!=smollm2-135m"),
    ],
)
def test_a_name_has_one_canonical_spelling(text: str, canonical: str) -> None:
    assert str(parse_name(text)) == canonical
    assert parse_name(canonical) == parse_name(text)


def test_the_parts_of_a_name() -> None:
    assert parse_name("computation.gpt/units/length@pi-7?slots.ne=2") == Name(
        Kind.COMPUTATION,
        ("units", "length"),
        "pi-7",
        (Constraint("slots", Operator.NE, 2),),
    )


@pytest.mark.parametrize("word", sorted(SHELL_WORDS))
def test_every_operator_has_a_spelling_that_needs_no_quotes(word: str) -> None:
    symbol = SHELL_WORDS[word].value
    assert parse_name(f"knowledge.gpt/a,context.{word}=5") == parse_name(
        f"knowledge.gpt/a?context{symbol}5"
    )


@pytest.mark.parametrize("text", ["knowledge.gpt/*", "data.gpt/a/*/c", "knowledge.gpt/a/**"])
def test_wildcards_stand_in_queries_only(text: str) -> None:
    assert parse_query(text).is_pattern
    with pytest.raises(WildcardNotAllowed) as caught:
        parse_name(text)
    assert caught.value.column == text.index("*") + 1


FAULTS: list[tuple[str, type[NamingError], int, str | None]] = [
    ("", EmptyName, 1, "knowledge.gpt/general"),
    ("  ", EmptyName, 1, "knowledge.gpt/general"),
    ("knowlege.gpt/maths", UnknownKind, 1, "knowledge"),
    ("Data.gpt/x", UnknownKind, 1, "data"),
    ("zzz.gpt/x", UnknownKind, 1, None),
    ("arithmetic", MissingSuffix, 1, "knowledge.gpt/arithmetic"),
    ("knowledge/maths", MissingSuffix, 10, "knowledge.gpt/maths"),
    ("knowledge.gtp/maths", MissingSuffix, 10, "knowledge.gpt/maths"),
    ("computaton", MissingSuffix, 11, "computation.gpt/general"),
    ("knowledge.gpt", MissingSuffix, 14, "knowledge.gpt/general"),
    ("knowledge.gpt/", BadLabel, 15, "knowledge.gpt/general"),
    ("knowledge.gpt/a//b", BadLabel, 17, "knowledge.gpt/a/b"),
    ("knowledge.gpt/a/", BadLabel, 17, "knowledge.gpt/a"),
    ("knowledge.gpt/aRith", BadLabel, 16, "arith"),
    ("knowledge.gpt/-a", BadLabel, 15, "a"),
    ("knowledge.gpt/a b", BadLabel, 16, "a-b"),
    ("knowledge.gpt/" + "a" * 64, TooLong, 78, None),
    ("knowledge.gpt/" + "/".join("abcdefghi"), TooLong, 31, None),
    ("knowledge.gpt/" + "/".join(["a" * 60] * 4), TooLong, 254, None),
    ("a" * 2049, TooLong, 2049, None),
    ("knowledge.gpt/a@", BadNode, 17, None),
    ("knowledge.gpt/a@b c", BadNode, 18, "b-c"),
    ("knowledge.gpt/a@" + "b" * 64, BadNode, 80, None),
    ("knowledge.gpt/a?", BadConstraint, 17, "context>=8192"),
    ("knowledge.gpt/a?slots=1&", BadConstraint, 25, "context>=8192"),
    ("knowledge.gpt/a?contxt>=8k", UnknownField, 17, "context"),
    ("knowledge.gpt/a?Context>=8k", UnknownField, 17, "context"),
    ("knowledge.gpt/a?tokens-per-s>=8", UnknownField, 17, "tokens_per_s"),
    ("knowledge.gpt/a?>=8", UnknownField, 17, None),
    ("knowledge.gpt/a?x_" + "a" * 40 + "=8", UnknownField, 17, None),
    ("knowledge.gpt/a?context", BadOperator, 24, ">="),
    ("knowledge.gpt/a?context==8", BadOperator, 24, "="),
    ("knowledge.gpt/a?context=>8", BadOperator, 24, ">="),
    ("knowledge.gpt/a?context.gte=8", BadOperator, 25, "ge"),
    ("knowledge.gpt/a?context.ge8", BadOperator, 27, "context.ge="),
    ("knowledge.gpt/a?context.ge>8", BadOperator, 27, "context.ge="),
    ("knowledge.gpt/a?zone>=lab", BadOperator, 21, "="),
    ("knowledge.gpt/a?context>=", BadValue, 26, None),
    ("knowledge.gpt/a?context>=8192x", BadValue, 26, "8192"),
    ("knowledge.gpt/a?context>=1e5", BadValue, 26, "1"),
    ("knowledge.gpt/a?context>=999999T", BadValue, 26, "999999"),
    ("knowledge.gpt/a?quant>=q44", BadValue, 24, "q4"),
    ("knowledge.gpt/a?privacy<=lam", BadValue, 26, "lan"),
    ("knowledge.gpt/a?zone=la b", BadValue, 24, None),
    ("knowledge.gpt/a?zone=" + "a" * 65, BadValue, 86, None),
    ("knowledge.gpt/a?x_a>=b", BadValue, 22, None),
    ("knowledge.gpt/a?" + "&".join(f"slots>={n}" for n in range(9)), BadConstraint, 89, None),
]


@pytest.mark.parametrize(("text", "kind", "column", "suggestion"), FAULTS)
def test_a_fault_names_its_column_and_the_nearest_valid_thing(
    text: str, kind: type[NamingError], column: int, suggestion: str | None
) -> None:
    with pytest.raises(NamingError) as caught:
        parse_name(text)
    error = caught.value
    assert type(error) is kind
    assert (error.column, error.suggestion) == (column, suggestion)
    assert f"column {column}:" in str(error)
    if suggestion is not None:
        assert f'"{suggestion}"' in error.message


def test_misplaced_wildcards_in_a_query() -> None:
    for text, column in (("data.gpt/**/a", 10), ("data.gpt/a*", 11), ("data.gpt/***", 10)):
        with pytest.raises(WildcardNotAllowed) as caught:
            parse_query(text)
        assert (caught.value.column, caught.value.suggestion) == (column, "*")


def test_a_capability_is_announced_by_a_bare_name() -> None:
    assert parse_capability_name("data.gpt/readme").is_bare
    for text in ("data.gpt/readme@pi", "data.gpt/readme?slots=1"):
        with pytest.raises(NotBare) as caught:
            parse_capability_name(text)
        assert (caught.value.column, caught.value.suggestion) == (16, "data.gpt/readme")


def test_the_pointer_puts_a_caret_under_the_fault() -> None:
    with pytest.raises(BadLabel) as caught:
        parse_name("knowledge.gpt/aRith")
    assert caught.value.pointer() == "knowledge.gpt/aRith\n               ^"


def test_control_characters_never_reach_a_terminal() -> None:
    with pytest.raises(NamingError) as caught:
        parse_name("knowledge.gpt/a\x1b[2J\n\ud800")
    shown = caught.value.message + caught.value.pointer().replace("\n", "", 1)
    assert shown.isprintable()
    shown.encode()


def test_codes_are_stable_and_distinct() -> None:
    def tree(root: type[NamingError]) -> list[type[NamingError]]:
        return [root, *(found for child in root.__subclasses__() for found in tree(child))]

    codes = {kind.code for kind in tree(NamingError)}
    assert len(codes) == len(tree(NamingError))
    docs = naming_errors.__doc__ or ""
    for kind in tree(NamingError):
        assert kind.__name__ in docs, f"{kind.__name__} is missing from the drawing of the tree"
        assert kind.code in docs


def test_the_users_page_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs" / "names.md").read_text(encoding="utf-8")
    shown = re.findall(r"`'?((?:knowledge|data|computation)\.gpt/[^`' ]+)'?`", page)
    assert len(shown) > 10
    for text in shown:
        if text != "knowledge.gpt/Math":  # shown as a fault
            parse_query(text)
    for constraint in re.findall(r"`([a-z_]+(?:[<>]=?|!?=)[^`]+)`", page):
        parse_query(f"knowledge.gpt/a?{constraint}")
    for field in FIELDS:
        assert f"`{field}`" in page
    for text, _, _, _ in FAULTS:
        with pytest.raises(NamingError) as caught:
            parse_name(text)
        assert f"`{caught.value.code}`" in page


_LABELS = st.from_regex(r"[a-z0-9][a-z0-9\-_.]{0,20}", fullmatch=True)
_NODES = st.none() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9\-_.]{0,20}", fullmatch=True)
_NUMBERS = st.one_of(
    st.integers(0, 999).map(str),
    st.from_regex(r"[0-9]{1,15}(\.[0-9]{1,6})?", fullmatch=True),
    st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,6})?(k|M|Ki|gi)", fullmatch=True),
)
_TEXTS = st.from_regex(r"[A-Za-z0-9\-_.:/+]{1,20}", fullmatch=True)


@st.composite
def _constraints(draw: st.DrawFn) -> str:
    field = draw(st.sampled_from(sorted(FIELDS)) | st.just("x_mine"))
    operator = draw(st.sampled_from([*(one.value for one in Operator), *SHELL_WORDS]))
    kind = FIELDS.get(field, FieldType.NUMBER)
    match kind:
        case FieldType.NUMBER:
            value = draw(_NUMBERS)
        case FieldType.QUANTISATION:
            value = draw(st.sampled_from(QUANTISATIONS))
        case FieldType.PRIVACY:
            value = draw(st.sampled_from(["local", "LAN", "mesh", "cloud"]))
        case _:
            operator, value = draw(st.sampled_from(["=", "!=", "eq", "ne"])), draw(_TEXTS)
    return f"{field}.{operator}={value}" if operator in SHELL_WORDS else f"{field}{operator}{value}"


@st.composite
def _names(draw: st.DrawFn) -> str:
    labels = draw(st.lists(_LABELS | st.just("*"), min_size=1, max_size=LABELS_MAX))
    rest = draw(st.sampled_from(["", "/**"])) if len(labels) < LABELS_MAX else ""
    node = draw(_NODES)
    constraints = draw(st.lists(_constraints(), max_size=4))
    text = f"{draw(st.sampled_from(list(Kind)))}.gpt/{'/'.join(labels)}{rest}"
    text += f"@{node}" if node else ""
    if constraints:
        text += draw(st.sampled_from("?,")) + draw(st.sampled_from("&,")).join(constraints)
    return text


@given(_names())
@settings(max_examples=100, deadline=None)
def test_parsing_what_was_printed_gives_the_same_name(text: str) -> None:
    name = parse_query(text)
    assert parse_query(str(name)) == name
    assert str(parse_query(str(name))) == str(name)
    assert len(str(name)) <= TEXT_CHARS_MAX


_NOISE = st.text(st.sampled_from("knowledgdata.gpt/*@?&,=<>!x_Q48 \n\u0130"), max_size=60)


@given(st.text(max_size=80) | _NOISE | _NOISE.map("knowledge.gpt/a".__add__))
@example("knowledge.gpt/a?context>=" + "9" * 400)
@example("\ud800.gpt/x")
@example("." * TEXT_CHARS_MAX)
@settings(max_examples=100, deadline=None)
def test_any_text_parses_or_is_a_naming_error(text: str) -> None:
    for parse in (parse_name, parse_query, parse_capability_name):
        error: NamingError | None = None
        try:
            name = parse(text)
        except NamingError as caught:
            error = caught
        else:
            assert parse(str(name)) == name
        if error is not None:
            assert 1 <= error.column <= len(text) + 1
            assert error.message.isprintable()
            assert len(error.pointer().splitlines()) <= 2
            assert isinstance(error, MalformedName | BadConstraint | NotBare)
