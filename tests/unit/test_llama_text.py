from hypothesis import given, settings
from hypothesis import strategies as st

from meshd_plugins.builtin.llama.engine.text import Piece, TextAssembler


def assemble(parts: list[bytes], stops: tuple[str, ...]) -> tuple[list[Piece], TextAssembler]:
    assembler = TextAssembler(stops)
    pieces: list[Piece] = []
    for token, part in enumerate(parts):
        if piece := assembler.add(token, part):
            pieces.append(piece)
        if assembler.stopped:
            return pieces, assembler
    if piece := assembler.finish():
        pieces.append(piece)
    return pieces, assembler


def test_a_character_is_shown_when_its_last_byte_is_there() -> None:
    pieces, _ = assemble([b"\xe2", b"\x82", b"\xac", b"!"], ())
    assert pieces == [Piece("€", (0, 1, 2), 0), Piece("!", (3,), 3)]


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    pieces, _ = assemble([b"a", b"\xe2"], ())
    assert [piece.text for piece in pieces] == ["a", "\ufffd"]


def test_what_could_become_a_stop_string_is_held_back() -> None:
    pieces, assembler = assemble([b"one ", b"EN", b"D", b"never"], ("END",))
    assert assembler.stopped
    assert pieces == [Piece("one ", (0,), 0), Piece("", (1, 2), 1)]


def test_what_did_not_become_a_stop_string_is_shown_later() -> None:
    pieces, assembler = assemble([b"EN", b"ough"], ("END",))
    assert not assembler.stopped
    assert pieces == [Piece("ENough", (0, 1), 0)]


def test_the_first_of_several_stop_strings_counts() -> None:
    pieces, _ = assemble([b"a\n\nb User:"], ("User:", "\n\n"))
    assert "".join(piece.text for piece in pieces) == "a"


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet="abcé€😀", max_size=30),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.lists(st.text(alphabet="abcé€😀", min_size=1, max_size=4), max_size=3),
)
def test_however_the_bytes_are_cut_the_text_is_the_same(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    data = text.encode()
    parts: list[bytes] = []
    while data:
        size = cuts[len(parts) % len(cuts)]
        parts.append(data[:size])
        data = data[size:]
    pieces, assembler = assemble(parts, tuple(stops))
    shown = "".join(piece.text for piece in pieces)
    places = [text.find(stop) for stop in stops if stop in text]
    assert assembler.stopped == bool(places)
    if not places:
        assert shown == text
    else:
        # A stop string that is complete earlier wins over one that begins earlier.
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
        assert not any(stop in shown for stop in stops)
    tokens = [token for piece in pieces for token in piece.token_ids]
    assert tokens == list(range(len(tokens)))
    if not places:
        assert len(tokens) == len(parts)
