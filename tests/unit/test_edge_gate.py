"""Who is let in over TCP, with which key, how often; and how addresses and names are told apart."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.edge.errors import RequestError
from meshd.edge.gate import FAILURES_MAX, LOCAL, Access, Gate, scope_of
from meshd.edge.rates import BUCKETS_MAX, Buckets
from meshd.edge.sources import Sources, has_body, host_name, is_loopback, plain_address, source_of
from meshd.trust.api_keys import ApiKeys, Rate, Scope
from meshd_naming import NamingError
from meshd_plugins.api import Privacy

HOME, AWAY = "127.0.0.1", "192.0.2.7"
NODE = "192.0.2.1"  # an address of ours that others reach


def bearer(text: str) -> Mapping[bytes, bytes]:
    return {b"authorization": f"Bearer {text}".encode()}


def entered(
    gate: Gate,
    key: str = "",
    client: str = AWAY,
    server: str = NODE,
    wanted: Scope | None = Scope.ASK,
    now_s: float = 0.0,
) -> Access | str:
    """The access, or the code of the refusal."""
    try:
        return gate.enter(bearer(key) if key else {}, client, server, wanted, now_s)
    except RequestError as error:
        return f"{error.status} {error.code}"


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    return ApiKeys(tmp_path)


def test_this_machine_needs_no_key_and_everybody_else_does(keys: ApiKeys) -> None:
    gate = Gate(keys)
    at_home = entered(gate, client=HOME, server=HOME)
    assert isinstance(at_home, Access)
    assert at_home.principal == "loopback"
    assert entered(gate) == "401 missing_api_key"
    # Our own address from outside, or an outside address of ours: neither end may be elsewhere.
    assert entered(gate, client=HOME) == "401 missing_api_key"
    assert entered(gate, server=HOME) == "401 missing_api_key"
    assert entered(gate, client="::1", server="::1") == at_home
    assert entered(gate, client="::ffff:127.0.0.1", server="::ffff:127.0.0.1") == at_home
    assert entered(gate, client="", server="") == "401 missing_api_key"
    strict = Gate(keys, require_key=True)
    assert entered(strict, client=HOME, server=HOME) == "401 missing_api_key"
    assert isinstance(entered(gate, wanted=None), Access)  # /healthz


def test_a_key_is_checked_wherever_it_comes_from(keys: ApiKeys) -> None:
    _, text = keys.create("laptop", privacy=Privacy.LAN)
    gate = Gate(keys)
    for client, server in ((AWAY, NODE), (HOME, HOME)):
        access = entered(gate, text, client, server)
        assert isinstance(access, Access)
        assert (access.principal, access.privacy_max) == ("key:laptop", Privacy.LAN)
        assert entered(gate, text[:-1] + "!", client, server) == "401 invalid_api_key"
    # Clients of OpenAI's API must send something; what is no key of ours counts as none, here only.
    assert entered(gate, "none", HOME, HOME) == entered(gate, "", HOME, HOME)
    assert entered(gate, "none") == "401 invalid_api_key"
    assert entered(Gate(keys, require_key=True), "none", HOME, HOME) == "401 invalid_api_key"
    assert entered(Gate(None), text) == "401 invalid_api_key"


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER  "])
def test_the_scheme_is_read_in_any_case(keys: ApiKeys, scheme: bytes) -> None:
    _, text = keys.create("laptop")
    headers = {b"authorization": scheme + text.encode() + b" "}
    assert Gate(keys).enter(headers, AWAY, NODE, Scope.ASK, 0.0).principal == "key:laptop"
    for wrong in (b"Basic " + text.encode(), text.encode(), b"", b"Bearer"):
        with pytest.raises(RequestError):
            Gate(keys).enter({b"authorization": wrong}, AWAY, NODE, Scope.ASK, 0.0)


def test_scopes_are_kept_apart(keys: ApiKeys) -> None:
    gate = Gate(keys)
    for scope in Scope:
        _, text = keys.create(scope.value, scopes=frozenset({scope}))
        for wanted in Scope:
            found = entered(gate, text, wanted=wanted)
            assert isinstance(found, Access) if wanted is scope else found == "403 scope_missing"
    assert entered(gate, client=HOME, server=HOME, wanted=Scope.ADMIN) == "403 scope_missing"
    assert LOCAL.scopes == frozenset(Scope)


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/healthz", None),
        ("POST", "/v1/chat/completions", Scope.ASK),
        ("GET", "/v1/models", Scope.ASK),
        ("POST", "/mesh/v1/ask", Scope.ASK),
        ("GET", "/mesh/v1/status", Scope.READ),
        ("HEAD", "/mesh/v1/store/diff", Scope.READ),
        ("GET", "/metrics", Scope.READ),
        ("GET", "/mesh/v1/config", Scope.ADMIN),
        ("GET", "/mesh/v1/keys", Scope.ADMIN),
        ("DELETE", "/mesh/v1/keys/laptop", Scope.ADMIN),
        ("POST", "/mesh/v1/leave", Scope.ADMIN),
        ("GET", "/mesh/v1/invites", Scope.ADMIN),
        ("POST", "/mesh/v1/trust/revoke", Scope.ADMIN),
        ("POST", "/mesh/v1/something/new", Scope.ADMIN),
        ("GET", "/mesh/v1/askance", Scope.READ),
        ("POST", "/mesh/v1/ask/", Scope.ADMIN),
        ("GET", "/", Scope.READ),
    ],
)
def test_what_a_request_takes(method: str, path: str, scope: Scope | None) -> None:
    assert scope_of(method, path) is scope


def test_a_key_has_its_rate(keys: ApiKeys) -> None:
    _, text = keys.create("slow", rate=Rate(2, 60))
    _, other = keys.create("other")
    gate = Gate(keys)
    assert isinstance(entered(gate, text), Access)
    assert isinstance(entered(gate, text), Access)
    with pytest.raises(RequestError) as refused:
        gate.enter(bearer(text), AWAY, NODE, Scope.ASK, 0.0)
    assert (refused.value.status, refused.value.code) == (429, "key_rate_exceeded")
    assert refused.value.retry_after_s == 30
    assert isinstance(entered(gate, other), Access)
    assert isinstance(entered(gate, text, now_s=30.0), Access)
    assert entered(gate, text, now_s=30.0) == "429 key_rate_exceeded"


def test_who_fails_is_told_to_wait_and_shuts_nobody_out(keys: ApiKeys) -> None:
    _, text = keys.create("laptop")
    gate = Gate(keys)
    for _ in range(FAILURES_MAX):
        assert entered(gate, text + "x") == "401 invalid_api_key"
    with pytest.raises(RequestError) as refused:
        gate.enter(bearer(text + "x"), AWAY, NODE, Scope.ASK, 0.0)
    assert (refused.value.status, refused.value.code) == (429, "too_many_failures")
    assert refused.value.retry_after_s == 6
    assert isinstance(entered(gate, text), Access)
    assert entered(gate, text + "x", client="192.0.2.8") == "401 invalid_api_key"
    assert entered(gate, text + "x", now_s=6.0) == "401 invalid_api_key"


def test_an_ended_key_says_so(tmp_path: Path) -> None:
    now_s = [0.0]
    keys = ApiKeys(tmp_path, lambda: now_s[0])
    _, text = keys.create("short", expires_in_s=5)
    now_s[0] = 5.0
    assert entered(Gate(keys), text) == "401 expired_api_key"


def test_a_key_for_some_models(keys: ApiKeys) -> None:
    _, text = keys.create("some", models=["knowledge.gpt/med/**", "SmolLM2-*"])
    access = entered(Gate(keys), text)
    assert isinstance(access, Access)
    for fine in (
        "knowledge.gpt/med",
        "knowledge.gpt/med/heart?context>=8192",
        "knowledge.gpt/med/heart@kitchen",
        "knowledge.gpt/med/heart,context.ge=8192",
        "SmolLM2-135M-Instruct",
    ):
        access.require(fine)
    for wrong in (
        "auto",
        "knowledge.gpt/general",
        "knowledge.gpt/**",
        "knowledge.gpt/**?model=SmolLM2-135M-Instruct",
        "data.gpt/med/heart",
        "gpt-4o",
    ):
        with pytest.raises(RequestError, match="only for knowledge"):
            access.require(wrong)
    with pytest.raises(NamingError):
        access.require("knowledge.gpt/med/../secret")
    LOCAL.require("knowledge.gpt/**")


# -- rates -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 20),
    st.floats(0.5, 100.0),
    st.lists(st.floats(0.0, 5.0), min_size=1, max_size=60),
)
def test_never_more_than_the_rate_and_a_burst(
    count: int, period_s: float, gaps: list[float]
) -> None:
    buckets, now_s, taken = Buckets(), 0.0, 0
    for gap_s in gaps:
        now_s += gap_s
        wait_s = buckets.take("x", count, period_s, now_s)
        assert wait_s >= 0.0
        if wait_s == 0.0:
            taken += 1
        else:  # who waits as long as it was told gets one
            now_s += wait_s + 1e-6 * period_s
            assert buckets.take("x", count, period_s, now_s) == 0.0
            taken += 1
    assert taken <= count + now_s * count / period_s + 1e-3


def test_the_table_of_buckets_is_bounded_and_forgets_the_longest_unused() -> None:
    buckets = Buckets(4)
    assert buckets.take("old", 1, 60.0, 0.0) == 0.0
    assert buckets.take("kept", 1, 60.0, 0.0) == 0.0
    for i in range(100):
        buckets.take(f"{i}", 1, 60.0, 1.0)
        assert buckets.take("kept", 1, 60.0, 1.0) > 0.0
    assert len(buckets) == 4
    assert buckets.take("old", 1, 60.0, 1.0) == 0.0
    assert BUCKETS_MAX >= 256, "a bucket for every key"


def test_a_clock_that_goes_back_gives_nothing() -> None:
    buckets = Buckets()
    assert buckets.take("x", 1, 1.0, 100.0) == 0.0
    assert buckets.take("x", 1, 1.0, 50.0) > 0.0


# -- names and addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "host", "good"),
    [
        (NODE, NODE, True),
        (NODE, f"{NODE}:8642", True),
        (f"::ffff:{NODE}", NODE, True),
        ("2001:db8::1", "[2001:db8::1]:8642", True),
        ("2001:db8::1", "[2001:0DB8:0::1]", True),
        ("fe80::1%eth0", "[fe80::1]", True),
        (NODE, "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::1", False),  # without brackets it has no end
        ("2001:db8::1", "[2001:db8::2]", False),
        (NODE, "board.local", True),
        (NODE, "board.LOCAL.:443", True),
        (NODE, "board.local.evil.example", False),
        (NODE, "localhost", True),
        (NODE, "3221225985", False),  # the address as one number
        (NODE, "0300.0.2.1", False),
    ],
)
def test_hosts_that_mean_this_node(local: str, host: str, good: bool) -> None:
    sources = Sources(["Board.local."])
    headers = {b"host": host.encode()}
    for _ in range(2):  # a second time from memory
        if good:
            sources.check(headers, local)
        else:
            with pytest.raises(RequestError, match="not a name of this node"):
                sources.check(headers, local)


@given(st.text(max_size=300))
def test_a_host_header_is_a_name_or_nothing(text: str) -> None:
    name = host_name(text)
    if name is not None:
        assert not set(name) & set("@/\\ []\r\n?#,;")
        assert host_name(name if ":" not in name else f"[{name}]") == name.removesuffix(".") or (
            name.endswith(".")
        )


def test_an_address_has_one_spelling_and_one_source() -> None:
    assert plain_address("::ffff:192.0.2.1") == "192.0.2.1"
    assert plain_address("no address") == "no address"
    assert is_loopback("127.8.8.8")
    assert is_loopback("::ffff:127.0.0.1")
    assert not is_loopback("")
    assert not is_loopback("0.0.0.0")
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:1:2:3")
    assert source_of("2001:db8::1") != source_of("2001:db8:0:1::1")
    assert source_of("::ffff:192.0.2.1") == source_of("192.0.2.1") != source_of("192.0.2.2")


@given(st.ip_addresses())
def test_every_address_has_a_source(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    assert source_of(str(address))
    assert source_of(source_of(str(address))) == source_of(str(address))


def test_a_body_is_known_from_its_headers() -> None:
    assert has_body({b"content-length": b"1"})
    assert has_body({b"transfer-encoding": b"chunked"})
    assert has_body({b"content-length": b"10"})
    assert not has_body({b"content-length": b"0"})
    assert not has_body({})
