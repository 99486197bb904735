"""The first line of a state file: any change of any byte is found, and nothing else is ever raised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.shell.envelope import Flaw, FlawedFile, disclose, enclose

WHOLE = enclose("epoch", 1, b"1732182035000")


def flaw_of(data: bytes, kind: str = "epoch", form: int = 1) -> Flaw:
    with pytest.raises(FlawedFile) as caught:
        disclose(kind, form, data)
    return caught.value.flaw


def test_the_golden_file() -> None:
    assert WHOLE == (b"meshd-state epoch 1 13 642c0da9af382a17891f7ec68f09f83c\n1732182035000")
    assert disclose("epoch", 1, WHOLE) == b"1732182035000"


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=300), form=st.integers(0, 99_999))
def test_what_is_enclosed_comes_back(content: bytes, form: int) -> None:
    assert disclose("store", form, enclose("store", form, content)) == content


def test_a_flip_of_any_bit_is_found() -> None:
    for at in range(len(WHOLE)):
        for bit in range(8):
            damaged = bytearray(WHOLE)
            damaged[at] ^= 1 << bit
            assert flaw_of(bytes(damaged)) is not Flaw.OTHER_FORMAT


def test_a_cut_at_any_byte_is_found_and_so_is_more() -> None:
    for length in range(len(WHOLE)):
        assert flaw_of(WHOLE[:length]) is Flaw.CUT_SHORT
    assert flaw_of(WHOLE + b"\0") is Flaw.DAMAGED


def test_each_flaw_is_named() -> None:
    assert flaw_of(b"1732182035000") is Flaw.NOT_OURS
    assert flaw_of(bytes(200)) is Flaw.NOT_OURS
    assert flaw_of(WHOLE.replace(b"1732182035000", b"9732182035000")) is Flaw.DAMAGED
    assert flaw_of(WHOLE.replace(b" 13 ", b" 013 ")) is Flaw.DAMAGED
    assert flaw_of(WHOLE, kind="peers") is Flaw.OTHER_KIND
    assert flaw_of(WHOLE, form=2) is Flaw.OTHER_FORMAT
    assert flaw_of(WHOLE.replace(b" 1 ", b" 2 ")) is Flaw.DAMAGED  # and not of another release


@settings(deadline=None, max_examples=100)
@given(noise=st.binary(max_size=200), prefix=st.sampled_from([b"", b"meshd-state ", WHOLE[:25]]))
def test_any_bytes_are_a_flaw(noise: bytes, prefix: bytes) -> None:
    data = prefix + noise
    if data != WHOLE:
        flaw_of(data)
