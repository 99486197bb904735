"""API keys: made once, good until revoked or ended, and never good because of damage."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from meshd.trust.api_keys import (
    KEY_PREFIX,
    KEYS_MAX,
    ApiKey,
    ApiKeyError,
    ApiKeys,
    Denial,
    KeyTermsError,
    NoSuchKey,
    Rate,
    Scope,
    parse_rate,
    parse_scopes,
    parse_span_s,
)
from meshd_plugins.api import Privacy

NAMES = st.sampled_from(["laptop", "ci", "phone", "a", "z9"])
NOW_S = 1_800_000_000


class Clock:
    def __init__(self) -> None:
        self.now_s = float(NOW_S)

    def __call__(self) -> float:
        return self.now_s


def file_of(folder: Path) -> Path:
    return folder / "edge" / "api-keys"


def test_a_key_is_good_and_says_what_it_opens(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path, Clock())
    made, text = keys.create(
        "laptop",
        scopes=frozenset({Scope.ASK, Scope.READ}),
        models=["knowledge.gpt/**"],
        rate=Rate(60, 60),
        privacy=Privacy.LAN,
        expires_in_s=90,
    )
    assert text.startswith(f"{KEY_PREFIX}{made.id}-")
    assert len(text) == len(KEY_PREFIX) + 8 + 1 + 32
    assert keys.verify(text) == made
    again = ApiKeys(tmp_path, Clock())
    assert again.verify(text) == made
    assert (made.privacy, made.rate, made.expires_s) == (Privacy.LAN, Rate(60, 60), NOW_S + 90)


def test_the_key_itself_is_nowhere(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path)
    made, text = keys.create("laptop")
    secret = text.rpartition("-")[2]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert secret not in path.read_text()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file_of(tmp_path).parent.stat().st_mode) == 0o700
    assert secret not in repr(made)
    assert made.digest.hex() not in repr(made)
    assert secret not in repr(keys.listed())


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_other_text_is_good(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    keys = ApiKeys(folder)
    _, text = keys.create("laptop")
    at = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(codec="latin-1"))
    other = data.draw(
        st.sampled_from(
            [
                text[:at],
                text[at:],
                text[:at] + letter + text[at + 1 :],
                text + letter,
                letter + text,
            ]
        )
        | st.text(max_size=80)
    )
    assert keys.verify(other) is Denial.WRONG or other == text


def test_each_key_has_a_secret_of_its_own(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path)
    (one, text), (two, other) = keys.create("one"), keys.create("two")
    mixed = f"{KEY_PREFIX}{one.id}-{other.rpartition('-')[2]}"
    assert keys.verify(mixed) is Denial.WRONG
    assert one.id != two.id
    assert keys.verify(text) == one


def test_a_revoked_key_is_good_no_more_here_or_later(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path)
    _, text = keys.create("laptop")
    keys.save_uses()
    keys.revoke("laptop")
    assert keys.verify(text) is Denial.WRONG
    assert ApiKeys(tmp_path).verify(text) is Denial.WRONG
    assert len(keys) == 0
    with pytest.raises(NoSuchKey, match="there are: none"):
        keys.revoke("laptop")
    _, other = keys.create("laptop")  # the name is free again, for another key
    assert keys.verify(text) is Denial.WRONG
    assert isinstance(keys.verify(other), ApiKey)


def test_a_key_ends_also_for_a_clock_that_goes_back(tmp_path: Path) -> None:
    clock = Clock()
    keys = ApiKeys(tmp_path, clock)
    _, text = keys.create("short", expires_in_s=60)
    _, other = keys.create("other")
    clock.now_s += 59
    assert isinstance(keys.verify(text), ApiKey)
    clock.now_s += 1
    assert keys.verify(text) is Denial.EXPIRED
    assert isinstance(keys.verify(other), ApiKey)
    assert keys.save_uses()
    clock.now_s = 0.0  # a board without a clock chip boots
    again = ApiKeys(tmp_path, clock)
    assert again.verify(text) is Denial.EXPIRED
    assert isinstance(again.verify(other), ApiKey)


def test_use_is_counted_and_written_only_when_asked_to(tmp_path: Path) -> None:
    clock = Clock()
    keys = ApiKeys(tmp_path, clock)
    _, text = keys.create("laptop")
    before = file_of(tmp_path).stat().st_ino
    assert keys.save_uses()  # nothing to write
    for _ in range(3):
        clock.now_s += 1
        keys.verify(text)
    assert file_of(tmp_path).stat().st_ino == before
    assert keys.save_uses()
    ((_, use),) = ApiKeys(tmp_path).listed()
    assert (use.count, use.last_s) == (3, NOW_S + 3)


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    daemon, command = ApiKeys(tmp_path), ApiKeys(tmp_path)
    _, first = daemon.create("first")
    _, second = command.create("second")
    daemon.verify(first)
    assert daemon.save_uses()
    assert isinstance(daemon.verify(second), ApiKey)  # learnt when it wrote
    assert {key.name for key, _ in ApiKeys(tmp_path).listed()} == {"first", "second"}
    command.revoke("first")
    assert daemon.save_uses()
    assert {key.name for key, _ in ApiKeys(tmp_path).listed()} == {"second"}
    assert daemon.verify(first) is Denial.WRONG


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_makes_no_key_good(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    _, text = ApiKeys(folder).create("laptop", privacy=Privacy.LOCAL)
    path = file_of(folder)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del raw[at:]
    path.write_bytes(raw)
    keys = ApiKeys(folder)
    assert keys.verify(text) is Denial.WRONG
    assert "meshd key create" in keys.damage
    assert not path.exists()
    assert path.with_name("api-keys.damaged").exists()
    keys.create("laptop")
    assert len(ApiKeys(folder)) == 1


def test_a_file_that_is_damaged_while_the_daemon_runs_takes_no_key_away(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path)
    _, text = keys.create("laptop")
    file_of(tmp_path).write_bytes(b"noise")
    keys.verify(text)
    assert keys.save_uses()
    assert isinstance(ApiKeys(tmp_path).verify(text), ApiKey)


def test_a_power_cut_leaves_the_old_keys_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever step of the writing: what is on the disk is whole."""
    keys = ApiKeys(tmp_path)
    _, old = keys.create("old")
    steps = ["open", "fsync", "rename"]
    for step in steps:

        def cut(*_args: object, **_options: object) -> int:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched:
            target: object = Path if step == "rename" else os
            patched.setattr(target, step, cut)
            with pytest.raises(ApiKeyError, match=r"was not made: .*Input/output error"):
                keys.create("new")
        assert isinstance(keys.verify(old), ApiKey)
        after = ApiKeys(tmp_path)
        assert isinstance(after.verify(old), ApiKey)
        assert len(after) == 1
        assert not after.damage
    keys.create("new")


def test_a_disk_that_refuses_says_that_a_revoked_key_would_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ApiKeys(tmp_path)
    _, text = keys.create("laptop")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ApiKeyError, match=r"revoked until this node restarts.*No space left"):
        keys.revoke("laptop")
    assert keys.verify(text) is Denial.WRONG
    assert not keys.damage


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "Laptop"}, "a-z, 0-9"),
        ({"name": ""}, "a-z, 0-9"),
        ({"name": "a" * 64}, "1 to 63"),
        ({"name": "-a"}, "not at either end"),
        ({"name": "a", "scopes": frozenset[Scope]()}, "needs a scope"),
        ({"name": "a", "models": ["a b"]}, "no pattern"),
        ({"name": "a", "models": ["[a-z]"]}, "no pattern"),
        ({"name": "a", "models": ["x"] * 17}, "16 patterns"),
        ({"name": "taken"}, "meshd key revoke taken"),
    ],
)
def test_terms_that_cannot_be_are_named(
    tmp_path: Path, options: dict[str, object], says: str
) -> None:
    keys = ApiKeys(tmp_path)
    keys.create("taken")
    with pytest.raises(KeyTermsError, match=says):
        keys.create(**options)  # type: ignore[arg-type]  # wrong on purpose
    assert len(keys) == 1


def test_there_are_so_many_keys_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(_descriptor: int) -> None:
        """Syncing 256 times would take seconds."""

    monkeypatch.setattr(os, "fsync", at_once)
    keys = ApiKeys(tmp_path)
    for i in range(KEYS_MAX):
        keys.create(f"key-{i}")
    with pytest.raises(KeyTermsError, match="256 keys"):
        keys.create("one-more")


def test_words_are_read() -> None:
    assert parse_rate("60/min") == Rate(60, 60)
    assert parse_rate("5/s") == Rate(5, 1)
    assert parse_rate("1000/day") == Rate(1000, 86_400)
    assert parse_rate("none") is None
    assert parse_span_s("90d") == 90 * 86_400
    assert parse_scopes("ask, read") == {Scope.ASK, Scope.READ}
    for wrong in ("60", "0/min", "60/year", "-1/min", "60 / min", ""):
        with pytest.raises(KeyTermsError, match="no rate"):
            parse_rate(wrong)
    for wrong in ("90", "0d", "d", "1000000d", "-1d"):
        with pytest.raises(KeyTermsError, match="no time"):
            parse_span_s(wrong)
    for wrong in ("", "ask,root", ","):
        with pytest.raises(KeyTermsError, match="no scope"):
            parse_scopes(wrong)


@given(st.integers(1, 999_999), st.sampled_from([1, 60, 3600, 86_400]))
def test_a_rate_reads_back(count: int, period_s: int) -> None:
    assert parse_rate(str(Rate(count, period_s))) == Rate(count, period_s)


@pytest.mark.parametrize(
    ("patterns", "path", "permitted"),
    [
        ((), "anything", True),
        (("knowledge.gpt/**",), "knowledge.gpt/general", True),
        (("knowledge.gpt/**",), "knowledge.gpt/a/b", True),
        (("knowledge.gpt/**",), "knowledge.gpt/**", True),
        (("knowledge.gpt/**",), "data.gpt/a", False),
        (("knowledge.gpt/**",), "auto", False),
        (("auto", "knowledge.gpt/**"), "auto", True),
        (("knowledge.gpt/med/*",), "knowledge.gpt/med/a", True),
        (("knowledge.gpt/med/*",), "knowledge.gpt/med", False),
        (("knowledge.gpt/med/*",), "knowledge.gpt/*", False),
        (("knowledge.gpt/med/*",), "knowledge.gpt/**", False),
        (("knowledge.gpt/med/*",), "knowledge.gpt/med/**", False),  # it means med itself too
        (("knowledge.gpt/med/**",), "knowledge.gpt/med/**", True),
        (("SmolLM2-*",), "SmolLM2-135M-Instruct", True),
        (("SmolLM2-*",), "knowledge.gpt/general", False),
        (("*",), "auto", True),
    ],
)
def test_what_may_be_asked_for(patterns: tuple[str, ...], path: str, permitted: bool) -> None:
    key = ApiKey("i", "n", b"", frozenset({Scope.ASK}), models=patterns)
    assert key.permits(path) is permitted


class KeysMachine(RuleBasedStateMachine):
    """Against a model: a dict from names to texts, whatever is done, and whenever the node restarts."""

    @initialize(folder=st.builds(lambda: Path(_fresh())))
    def begin(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.keys = ApiKeys(folder, self.clock)
        self.good: dict[str, str] = {}
        self.ends: dict[str, float] = {}
        self.gone: set[str] = set()

    @rule(name=NAMES, lasts=st.none() | st.integers(1, 100))
    def create(self, name: str, lasts: int | None) -> None:
        if name in self.good:
            with pytest.raises(KeyTermsError):
                self.keys.create(name)
            return
        _, self.good[name] = self.keys.create(name, expires_in_s=lasts)
        self.ends[name] = float("inf") if lasts is None else self.clock.now_s + lasts

    @rule(name=NAMES)
    def revoke(self, name: str) -> None:
        if name in self.good:
            self.keys.revoke(name)
            self.gone.add(self.good.pop(name))
        else:
            with pytest.raises(NoSuchKey):
                self.keys.revoke(name)

    @rule(passed=st.integers(0, 60))
    def wait(self, passed: int) -> None:
        self.clock.now_s += passed

    @rule()
    def restart(self) -> None:
        self.keys.save_uses()
        self.keys = ApiKeys(self.folder, self.clock)

    @invariant()
    def good_keys_are_good_and_no_others(self) -> None:
        for name, text in self.good.items():
            found = self.keys.verify(text)
            if self.clock.now_s < self.ends[name]:
                assert isinstance(found, ApiKey)
                assert found.name == name
            else:
                assert found is Denial.EXPIRED
        for text in self.gone:
            assert self.keys.verify(text) is Denial.WRONG


def _fresh() -> str:
    import tempfile

    return tempfile.mkdtemp(prefix="meshd-keys-")


KeysMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestKeysMachine = KeysMachine.TestCase
