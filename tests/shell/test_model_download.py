"""Downloads from a server that cuts, lies, stalls and leads astray."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.shell.support_models import (
    Answer,
    Asked,
    Cut,
    Honest,
    Hub,
    Piece,
    Silence,
    certificate,
    digest,
    head,
    model,
    redirect,
    shortened,
)

from meshd_plugins.builtin.llama.fetch.download import Download, DownloadLimits, Note
from meshd_plugins.builtin.llama.fetch.errors import FetchBroken, FetchError, FetchRefused

CONTENT = model(300_000)
LIMITS = DownloadLimits(
    bytes_max=1_000_000, stall_s=5.0, backoff_first_s=0.001, backoff_max_s=0.002, sync_s=0.0
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


def fetch(
    hub: Hub,
    to: Path,
    limits: DownloadLimits = LIMITS,
    *,
    from_hub: bool = False,
    sized: bool = False,
) -> Note:
    return Download(f"{hub.url}/model.gguf", to, limits, hub=from_hub, sized=sized).run()


def with_limits(**changes: float) -> DownloadLimits:
    fields = {name: getattr(LIMITS, name) for name in LIMITS.__slots__}
    return DownloadLimits(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_file_arrives_whole_and_is_not_asked_for_twice(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    with Hub(Honest(CONTENT)) as hub:
        to = tmp_path / "m"
        note = Download(
            f"{hub.url}/m.gguf", to, LIMITS, tell=lambda n, total: told.append((n, total))
        ).run()
        assert to.read_bytes() == CONTENT
        assert (note.complete, note.total) == (True, len(CONTENT))
        assert told[-1] == (len(CONTENT), len(CONTENT))
        Download(f"{hub.url}/m.gguf", to, LIMITS).run()
    assert len(hub.asked) == 1
    assert hub.asked[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("end", [Cut(), b""], ids=["reset", "closed"])
def test_a_cut_is_gone_on_from(tmp_path: Path, end: Piece) -> None:
    honest = Honest(CONTENT)
    with Hub(shortened(honest, 100_000, end), shortened(honest, 50_000, end), honest) as hub:
        fetch(hub, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == CONTENT
    first, second, third = hub.asked
    assert "range" not in first.headers
    # A reset may throw away what the client had not read yet.
    assert 0 < second.begin <= 100_000 or end == Cut()
    assert second.begin <= third.begin <= 150_000
    assert all(a.headers["if-range"] == '"one"' for a in hub.asked if a.begin)


def test_another_process_goes_on_with_it(tmp_path: Path) -> None:
    honest = Honest(CONTENT)
    with Hub(shortened(honest, 100_000, b"")) as hub:
        with pytest.raises(FetchBroken) as raised:
            fetch(hub, tmp_path / "m", with_limits(tries_max=1))
        assert raised.value.code == "out_of_tries"
        hub.now(honest)
        fetch(hub, tmp_path / "m")
    assert hub.asked[-1].begin == 100_000
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_what_a_power_cut_left_behind_the_note_is_cut_off(tmp_path: Path) -> None:
    honest, to = Honest(CONTENT), tmp_path / "m"
    with Hub(shortened(honest, 100_000, b"")) as hub:
        with pytest.raises(FetchBroken):
            fetch(hub, to, with_limits(tries_max=1))
        to.write_bytes(to.read_bytes() + b"\0" * 5000)  # a length without its bytes
        hub.now(honest)
        fetch(hub, to)
    assert to.read_bytes() == CONTENT


@pytest.mark.parametrize("note", [b"", b"{", b'{"synced": "x"}', b"[]", b"\xff" * 9000])
def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, note: bytes) -> None:
    to = tmp_path / "m"
    to.write_bytes(b"GGUF of another time")
    (tmp_path / "m.note").write_bytes(note)
    with Hub(Honest(CONTENT)) as hub:
        fetch(hub, to)
    assert to.read_bytes() == CONTENT
    assert hub.asked[0].begin == 0


def test_a_server_that_ignores_ranges_begins_anew(tmp_path: Path) -> None:
    def deaf(_asked: Asked) -> Iterable[Piece]:
        yield head(200, Content_Length=len(CONTENT), ETag='"one"')
        yield CONTENT

    with Hub(shortened(deaf, 100_000, b""), deaf) as hub:
        fetch(hub, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path: Path) -> None:
    later = model(250_000, seed=2)
    with Hub(shortened(Honest(CONTENT), 100_000, b""), Honest(later, etag='"two"')) as hub:
        fetch(hub, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == later


def lying(begin: int, end: int, total: int, etag: str = '"one"') -> Answer:
    """An answer to a range that says what it likes."""

    def answer(_asked: Asked) -> Iterable[Piece]:
        span = f"bytes {begin}-{end}/{total}"
        yield head(206, Content_Range=span, Content_Length=end - begin + 1, ETag=etag)
        yield b"X" * (end - begin + 1)

    return answer


@pytest.mark.parametrize(
    "lie",
    [
        lying(90_000, len(CONTENT) - 1, len(CONTENT)),
        lying(100_000, len(CONTENT) - 1, len(CONTENT), etag='"two"'),
        lying(100_000, 100_999, len(CONTENT)),
        lying(100_000, 199_999, 200_000),
        lambda _asked: [head(206, Content_Length=10), b"X" * 10],
        lambda _asked: [head(206, Content_Length=10, Content_Range="bytes x"), b"X" * 10],
        lambda _asked: [head(416, Content_Length=0)],
    ],
    ids=["start", "etag", "end", "total", "no range", "no sense", "416"],
)
def test_a_lie_about_a_range_is_not_put_into_the_file(tmp_path: Path, lie: Answer) -> None:
    honest = Honest(CONTENT)
    with Hub(shortened(honest, 100_000, b""), lie, honest) as hub:
        fetch(hub, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == CONTENT
    assert len(hub.asked) == 3


def test_a_length_that_never_comes_spends_the_budget(tmp_path: Path) -> None:
    def boastful(_asked: Asked) -> Iterable[Piece]:
        yield head(200, Content_Length=len(CONTENT) * 2)
        yield CONTENT

    with Hub(boastful) as hub, pytest.raises(FetchBroken, match="ended after") as raised:
        fetch(hub, tmp_path / "m", with_limits(vain_tries_max=3))
    assert raised.value.code == "cut_short"
    assert len(hub.asked) == 4
    assert not Note.read(tmp_path / "m.note").complete


def test_more_than_the_length_is_not_read(tmp_path: Path) -> None:
    def generous(_asked: Asked) -> Iterable[Piece]:
        yield head(200, Content_Length=len(CONTENT))
        yield CONTENT + b"more"

    with Hub(generous) as hub:
        fetch(hub, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_without_a_length_the_digest_must_be_known(tmp_path: Path) -> None:
    def silent(_asked: Asked) -> Iterable[Piece]:
        yield head(200)
        yield CONTENT

    with Hub(silent) as hub:
        with pytest.raises(FetchRefused) as raised:
            fetch(hub, tmp_path / "m")
        assert raised.value.code == "no_length"
        assert fetch(hub, tmp_path / "m", sized=True).total == len(CONTENT)


def test_a_file_that_is_too_large_is_refused_before_and_while_it_comes(tmp_path: Path) -> None:
    def endless(_asked: Asked) -> Iterable[Piece]:
        yield head(200, Transfer_Encoding="chunked")
        yield b"4\r\nGGUF\r\n"
        for _ in range(100):
            yield b"4000\r\n" + b"A" * 0x4000 + b"\r\n"

    with Hub(Honest(CONTENT), endless) as hub:
        for _ in range(2):
            with pytest.raises(FetchRefused) as raised:
                fetch(hub, tmp_path / "m", with_limits(bytes_max=200_000), sized=True)
            assert raised.value.code == "too_large"
    assert (tmp_path / "m").stat().st_size <= 200_000


def test_chunks_that_break_off_are_no_whole_file(tmp_path: Path) -> None:
    def torn(_asked: Asked) -> Iterable[Piece]:
        yield head(200, Transfer_Encoding="chunked")
        yield b"5\r\nGGUF!\r\nFFFF\r\nshort"

    with Hub(torn) as hub, pytest.raises(FetchBroken) as raised:
        fetch(hub, tmp_path / "m", with_limits(vain_tries_max=2), sized=True)
    assert raised.value.code == "cut_short"


def test_a_page_about_a_model_is_no_model(tmp_path: Path) -> None:
    def page(_asked: Asked) -> Iterable[Piece]:
        yield head(200, Content_Length=30, Content_Type="text/html; charset=utf-8")
        yield b"<html>".ljust(30)

    with Hub(page) as hub, pytest.raises(FetchRefused, match="the server calls it text/html"):
        fetch(hub, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size == 0


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "not_found"), (410, "not_found"), (401, "forbidden"), (418, "refused")],
)
def test_what_the_server_says_no_to_is_not_asked_again(
    tmp_path: Path, status: int, code: str
) -> None:
    with Hub(lambda _asked: [head(status, Content_Length=0)]) as hub:
        with pytest.raises(FetchRefused) as raised:
            fetch(hub, tmp_path / "m")
        assert raised.value.code == code
    assert len(hub.asked) == 1


def test_a_server_in_trouble_is_asked_again(tmp_path: Path) -> None:
    trouble: Answer = lambda _asked: [head(503, Content_Length=0, Retry_After=0)]  # noqa: E731
    with Hub(trouble, trouble, Honest(CONTENT)) as hub:
        fetch(hub, tmp_path / "m")
    assert len(hub.asked) == 3


def test_redirects_are_bounded_and_lead_to_the_web_only(tmp_path: Path) -> None:
    with Hub(redirect("/again")) as hub, pytest.raises(FetchRefused) as raised:
        fetch(hub, tmp_path / "m")
    assert (raised.value.code, len(hub.asked)) == ("redirected", 6)
    for target in ("file:///etc/passwd", "", "http://", "ftp://127.0.0.1/x", "http://[::1"):
        with Hub(redirect(target)) as hub, pytest.raises(FetchRefused) as raised:
            fetch(hub, tmp_path / "m")
        assert raised.value.code == "redirected", target


def test_https_is_kept_and_its_certificates_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls, trusted = certificate(tmp_path)
    with Hub(Honest(CONTENT)) as plain, Hub(redirect(f"{plain.url}/m"), tls=tls) as hub:
        with pytest.raises(FetchRefused) as raised:
            fetch(hub, tmp_path / "m")
        assert raised.value.code == "tls"
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        with pytest.raises(FetchRefused) as raised:
            fetch(hub, tmp_path / "m")
        assert raised.value.code == "insecure"
        assert plain.asked == []
        hub.now(shortened(Honest(CONTENT), 100_000, b""), Honest(CONTENT))
        fetch(hub, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_a_certificate_for_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls, trusted = certificate(tmp_path, "elsewhere.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    with Hub(Honest(CONTENT), tls=tls) as hub, pytest.raises(FetchRefused, match="not good for it"):
        fetch(hub, tmp_path / "m")


def test_silence_is_ended_and_gone_on_from(tmp_path: Path) -> None:
    honest = Honest(CONTENT)
    with Hub(shortened(honest, 100_000, Silence()), honest) as hub:
        fetch(hub, tmp_path / "m", with_limits(stall_s=0.2))
    assert (tmp_path / "m").read_bytes() == CONTENT
    assert hub.asked[1].begin == 100_000


def test_a_trickle_is_cut_by_who_watches(tmp_path: Path) -> None:
    honest = Honest(CONTENT)
    with Hub(shortened(honest, 100_000, Silence()), honest) as hub:
        limits = with_limits(stall_s=60.0, window_s=0.3)
        download = Download(f"{hub.url}/m", tmp_path / "m", limits)
        thread = threading.Thread(target=download.run)
        thread.start()
        while thread.is_alive():
            download.watch()
            thread.join(0.02)
    assert (tmp_path / "m").read_bytes() == CONTENT


def test_it_stops_when_told_to_and_keeps_what_it_has(tmp_path: Path) -> None:
    honest = Honest(CONTENT)
    with Hub(shortened(honest, 100_000, Silence())) as hub:
        begun, errors = threading.Event(), list[FetchError]()

        def tell(so_far: int, _total: int | None) -> None:
            if so_far == 100_000:
                begun.set()

        download = Download(f"{hub.url}/m", tmp_path / "m", LIMITS, tell=tell)

        def run() -> None:
            try:
                download.run()
            except FetchError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert begun.wait(30)
        download.stop()
        thread.join(30)
    assert [type(error) for error in errors] == [FetchBroken]
    assert Note.read(tmp_path / "m.note").synced == 100_000


def test_only_the_hubs_own_word_on_digests_counts(tmp_path: Path) -> None:
    linked = {"X_Linked_Etag": f'"{digest(CONTENT)}"', "X_Repo_Commit": "c0ffee12"}
    stranger = {"X_Linked_Etag": f'"{"0" * 64}"', "X_Repo_Commit": "deadbeef"}
    with Hub(Honest(CONTENT, extra=stranger)) as store:
        hub = Hub(redirect("/moved", 307), redirect(f"{store.url}/blob", **linked))
        with hub:
            note = fetch(hub, tmp_path / "m", from_hub=True)
    assert (note.sha256, note.commit) == (digest(CONTENT), "c0ffee12")
    with Hub(Honest(CONTENT, extra=stranger)) as web:
        note = fetch(web, tmp_path / "n")
    assert (note.sha256, note.commit) == ("", "")


def test_a_hub_that_contradicts_itself_on_the_size_is_refused(tmp_path: Path) -> None:
    with (
        Hub(Honest(CONTENT, extra={"X_Linked_Size": 7})) as hub,
        pytest.raises(FetchRefused, match="7 bytes"),
    ):
        fetch(hub, tmp_path / "m", from_hub=True)


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keys")
    (tmp_path / "m").symlink_to(precious)
    with Hub(Honest(CONTENT)) as hub, pytest.raises(OSError, match="symbolic"):
        fetch(hub, tmp_path / "m")
    assert precious.read_text() == "keys"


@given(
    cuts=st.lists(
        st.tuples(st.integers(0, 40_000), st.sampled_from(["honest", "deaf", "other", "lie"])),
        max_size=6,
    )
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_the_server_does_a_complete_file_is_one_of_its_files(
    tmp_path: Path, cuts: list[tuple[int, str]]
) -> None:
    one, two = model(30_000), model(30_000, seed=2)
    honest, other = Honest(one), Honest(two, etag='"two"')
    kinds: dict[str, Answer] = {
        "honest": honest,
        "other": other,
        "deaf": lambda _asked: [head(200, Content_Length=len(one), ETag='"one"'), one],
        "lie": lying(7, 20, 21),
    }
    to = tmp_path / os.urandom(8).hex()
    answers = [shortened(kinds[kind], count, b"") for count, kind in cuts]
    with Hub(*answers, honest) as hub:
        note = fetch(hub, to, with_limits(tries_max=30, vain_tries_max=30))
    assert note.complete
    assert to.read_bytes() in (one, two)
