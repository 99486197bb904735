"""The edge beyond loopback, over real sockets: TLS, keys, what goes to the mesh, and the endpoints of `meshd key`."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest
import trio
from openai import DefaultHttpxClient, OpenAI
from tests.shell.support_fake_mesh import FAMILY, FakeMesh, serving

from meshd.config import load
from meshd.edge.counters import EdgeCounters
from meshd.edge.errors import EdgeNotSecured
from meshd.edge.exposure import Certificate, Exposure, Names, open_exposure
from meshd.edge.limits import ConnectionLimits, EdgeLimits
from meshd.edge.server import EdgeSockets
from meshd.trust.api_keys import ApiKeys, Scope
from meshd_plugins.api import Privacy

T = TypeVar("T")
HOST = "127.0.0.1"
QUESTION = {"model": "knowledge.gpt/general", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the certificate."""
    return tmp_path_factory.mktemp("edge")


@pytest.fixture(scope="module")
def certificate(folder: Path) -> Certificate:
    return Certificate(folder / "c.pem", folder / "k.pem", Names("board", lambda: (HOST,)))


class Scene:
    """An edge with TLS and keys, and what is seen of it."""

    def __init__(self, folder: Path, certificate: Certificate, pem: Path) -> None:
        self.folder = folder
        self.mesh, self.counters, self.keys = FakeMesh(), EdgeCounters(), ApiKeys(folder)
        self.exposure = Exposure(self.keys, certificate)
        self.trust = ssl.create_default_context(cafile=pem)

    def run(self, use: Callable[[EdgeSockets], T], *, require_key: bool = True) -> T:
        """Run `use`, which blocks, in a thread beside the server."""

        async def main() -> T:
            async with serving(
                self.mesh,
                self.folder,
                EdgeLimits(require_key=require_key),
                connection_limits=ConnectionLimits(head_s=0.3),
                exposure=self.exposure,
                counters=self.counters,
            ) as sockets:
                return await trio.to_thread.run_sync(use, sockets)

        return trio.run(main)

    def ask(
        self,
        sockets: EdgeSockets,
        method: str,
        path: str,
        key: str = "",
        body: object = None,
    ) -> tuple[int, Any]:
        """One request over TLS; status and decoded body."""
        connection = http.client.HTTPSConnection(HOST, sockets.port, context=self.trust, timeout=10)
        with closing(connection):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            if body is not None:
                headers["Content-Type"] = "application/json"
            connection.request(
                method, path, json.dumps(body) if body is not None else None, headers
            )
            answer = connection.getresponse()
            raw = answer.read()
            return answer.status, json.loads(raw) if raw.startswith(b"{") else raw


@pytest.fixture
def scene(tmp_path: Path, certificate: Certificate, folder: Path) -> Scene:
    return Scene(tmp_path, certificate, folder / "c.pem")


def test_the_openai_client_over_https(scene: Scene) -> None:
    _, text = scene.keys.create("laptop", privacy=Privacy.LAN)

    def use(sockets: EdgeSockets) -> None:
        def client(key: str) -> OpenAI:
            url = f"https://{HOST}:{sockets.port}/v1"
            http_client = DefaultHttpxClient(verify=scene.trust)
            return OpenAI(base_url=url, api_key=key, max_retries=0, http_client=http_client)

        with client(text) as good:
            question: Any = QUESTION
            chat: Any = good.chat.completions
            answer = chat.create(**question)
            assert answer.choices[0].message.content == "Hello, wörld"
            streamed = chat.create(stream=True, **question)
            texts: list[str] = [c.choices[0].delta.content or "" for c in streamed if c.choices]
            assert "".join(texts) == "Hello, wörld"
            assert any(model.id == FAMILY for model in good.models.list())
        with client("sk-meshd-wrong") as bad, pytest.raises(openai.AuthenticationError) as refused:
            bad.models.list()
        body: Any = refused.value.body
        assert body["code"] == "invalid_api_key"
        assert body["type"] == "invalid_request_error"
        assert refused.value.response.headers["www-authenticate"].startswith("Bearer")

    scene.run(use)
    assert {ask.principal for ask in scene.mesh.asks} == {"key:laptop"}
    assert {ask.privacy_max for ask in scene.mesh.asks} == {Privacy.LAN}
    ((_, used),) = scene.keys.listed()
    assert used.count == 3


def test_who_asks_is_told_to_the_mesh(scene: Scene) -> None:
    def use(sockets: EdgeSockets) -> None:
        assert scene.ask(sockets, "POST", "/v1/chat/completions", body=QUESTION)[0] == 200
        unix = http.client.HTTPConnection("meshd")
        unix.sock = socket.socket(socket.AF_UNIX)
        unix.sock.connect(str(sockets.path))
        body = {"target": "knowledge.gpt/general", "prompt": "Hi"}
        with closing(unix):
            unix.request("POST", "/mesh/v1/ask", json.dumps(body))
            assert unix.getresponse().read()

    scene.run(use, require_key=False)
    assert [ask.principal for ask in scene.mesh.asks] == ["loopback", "local"]


def test_keys_open_what_they_should(scene: Scene) -> None:
    _, asks = scene.keys.create("asks", models=["knowledge.gpt/**"])
    _, reads = scene.keys.create("reads", scopes=frozenset({Scope.READ}))
    _, admin = scene.keys.create("admin", scopes=frozenset(Scope))

    def use(sockets: EdgeSockets) -> None:
        def code(method: str, path: str, key: str = "", body: object = None) -> tuple[int, str]:
            status, found = scene.ask(sockets, method, path, key, body)
            return status, found["error"]["code"] if status >= 400 else ""

        assert code("GET", "/healthz") == (200, "")
        for path in ("/v1/models", "/mesh/v1/status", "/metrics", "/nothing", "/mesh/v1/keys"):
            assert code("GET", path) == (401, "missing_api_key")
            assert code("GET", path, asks + "x") == (401, "invalid_api_key")
        assert code("POST", "/v1/chat/completions", asks, QUESTION) == (200, "")
        auto = {**QUESTION, "model": "auto"}
        assert code("POST", "/v1/chat/completions", asks, auto) == (403, "model_not_permitted")
        other = {"target": "data.gpt/document"}
        assert code("POST", "/mesh/v1/ask", asks, other) == (403, "model_not_permitted")
        listed = scene.ask(sockets, "GET", "/v1/models", asks)[1]["data"]
        assert [model["id"] for model in listed] == ["knowledge.gpt/general"]
        assert code("GET", "/mesh/v1/status", asks) == (403, "scope_missing")
        assert code("GET", "/mesh/v1/status", reads) == (200, "")
        assert code("GET", "/metrics", reads) == (200, "")
        assert code("GET", "/mesh/v1/config", reads) == (403, "scope_missing")
        assert code("POST", "/v1/chat/completions", reads, QUESTION) == (403, "scope_missing")
        assert code("POST", "/mesh/v1/leave", reads) == (403, "scope_missing")
        assert code("GET", "/mesh/v1/config", admin) == (200, "")
        assert not scene.mesh.left
        assert code("POST", "/mesh/v1/leave", admin) == (200, "")
        assert scene.mesh.left

    scene.run(use)
    assert len(scene.mesh.asks) == 1
    assert scene.counters.refused["missing_api_key"] == 5
    assert scene.counters.refused["invalid_api_key"] == 5
    assert scene.counters.refused["model_not_permitted"] == 2


def test_keys_are_made_listed_and_revoked_over_http(scene: Scene) -> None:
    _, admin = scene.keys.create("boss", scopes=frozenset({Scope.ADMIN}))

    def use(sockets: EdgeSockets) -> None:
        wanted = {"name": "ci", "scopes": "ask,read", "rate": "5/min", "expires": "90d"}
        status, made = scene.ask(sockets, "POST", "/mesh/v1/keys", admin, wanted)
        assert status == 200
        assert made["http_pin"] == scene.exposure.pin
        text = made["api_key"]
        status, listed = scene.ask(sockets, "GET", "/mesh/v1/keys", admin)
        assert [key["name"] for key in listed["keys"]] == ["boss", "ci"]
        assert text not in json.dumps(listed)
        assert listed["keys"][1]["rate"] == "5/min"
        for _ in range(5):
            assert scene.ask(sockets, "GET", "/v1/models", text)[0] == 200
        status, refused = scene.ask(sockets, "GET", "/v1/models", text)
        assert (status, refused["error"]["code"]) == (429, "key_rate_exceeded")
        assert 1 <= refused["error"]["retry_after_s"] <= 12
        revoked = scene.ask(sockets, "DELETE", "/mesh/v1/keys/ci", admin)
        assert revoked == (200, {"revoked": "ci", "left": 1})
        assert scene.ask(sockets, "GET", "/v1/models", text)[0] == 401
        for method, path, body, status, code in (
            ("DELETE", "/mesh/v1/keys/ci", None, 404, "no_such_key"),
            ("POST", "/mesh/v1/keys", {"name": "boss"}, 400, "key_terms"),
            ("POST", "/mesh/v1/keys", {"name": "a", "scopes": "root"}, 400, "key_terms"),
            ("POST", "/mesh/v1/keys", {"name": "a", "privacy": "x"}, 400, "key_terms"),
            ("POST", "/mesh/v1/keys", {"name": "a", "admin": True}, 400, "invalid_value"),
            ("PUT", "/mesh/v1/keys", {"name": "a"}, 405, "method_not_allowed"),
        ):
            found, answer = scene.ask(sockets, method, path, admin, body)
            assert (found, answer["error"]["code"]) == (status, code)

    scene.run(use)
    assert [key.name for key, _ in scene.keys.listed()] == ["boss"]


def outdated_tls() -> ssl.SSLContext:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    return old


def test_tls_is_new_enough_and_speaks_http_1(scene: Scene) -> None:
    # Made here and not in a thread: what catches warnings is one for the whole process.
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old = outdated_tls()

    def use(sockets: EdgeSockets) -> None:
        def shaken(context: ssl.SSLContext) -> tuple[str | None, str | None]:
            with (
                socket.create_connection((HOST, sockets.port), timeout=10) as plain,
                context.wrap_socket(plain, server_hostname=HOST) as secured,
            ):
                return secured.version(), secured.selected_alpn_protocol()

        scene.trust.set_alpn_protocols(["h2", "http/1.1"])
        assert shaken(scene.trust) == ("TLSv1.3", "http/1.1")
        scene.trust.maximum_version = ssl.TLSVersion.TLSv1_2
        assert shaken(scene.trust) == ("TLSv1.2", "http/1.1")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            shaken(old)

    scene.run(use)
    assert scene.counters.refused["tls_failed"] >= 1


def test_handshakes_that_do_not_end_are_given_up(scene: Scene) -> None:
    def use(sockets: EdgeSockets) -> None:
        for begun in (b"", b"\x16", b"\x16\x03\x01\x02\x00", b"\x16\x03\x01\x00\x05hello"):
            with socket.create_connection((HOST, sockets.port), timeout=10) as silent:
                silent.sendall(begun)
                with suppress(ConnectionResetError):
                    while silent.recv(1000):
                        pass

    scene.run(use)
    assert scene.counters.refused["tls_failed"] == 4
    assert scene.counters.open == 0


def test_plain_http_is_for_this_machine_only(scene: Scene) -> None:
    """Here everybody is on this machine; that others are not is for the gate to say, and is tested there."""

    def use(sockets: EdgeSockets) -> None:
        connection = http.client.HTTPConnection(HOST, sockets.port, timeout=10)
        with closing(connection):
            connection.request("GET", "/mesh/v1/status")
            answer = connection.getresponse()
            body = json.loads(answer.read())
        assert answer.status == 200
        assert body["http_pin"] == scene.exposure.pin

    scene.run(use, require_key=False)


def test_a_client_that_stops_reading_over_tls_holds_nothing(scene: Scene) -> None:
    async def main() -> None:
        async with serving(
            scene.mesh,
            scene.folder,
            connection_limits=ConnectionLimits(stalled_s=0.3),
            exposure=scene.exposure,
            counters=scene.counters,
        ) as sockets:
            plain = await trio.open_tcp_stream(HOST, sockets.port)
            stream = trio.SSLStream(plain, scene.trust, server_hostname=HOST)
            question = {**QUESTION, "model": "knowledge.gpt/endless", "stream": True}
            body = json.dumps(question).encode()
            await stream.send_all(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            with trio.fail_after(15):
                await scene.mesh.cancelled.wait()
                while scene.counters.open:
                    await trio.lowlevel.checkpoint()
            await trio.aclose_forcefully(stream)

    trio.run(main)
    assert scene.counters.stalled_closed == 1


# -- what a configuration may expose ---------------------------------------------------------------------


def exposed(folder: Path, **http_settings: str) -> Exposure:
    config = load(
        overrides={
            "node.state_dir": str(folder),
            "node.name": "board",
            **{f"http.{name}": value for name, value in http_settings.items()},
        }
    )
    return open_exposure(config, lambda: ("192.0.2.9",))


def test_loopback_needs_nothing(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "127.0.0.5", "::1", "localhost"):
        found = exposed(tmp_path, host=host)
        assert found.certificate is None
        assert found.pin == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])
def test_beyond_loopback_there_must_be_a_key(tmp_path: Path, host: str) -> None:
    with pytest.raises(EdgeNotSecured, match=r"meshd key create NAME.*http\.host to 127"):
        exposed(tmp_path, host=host)
    ApiKeys(tmp_path).create("laptop")
    found = exposed(tmp_path, host=host)
    assert found.pin.startswith("sha256//")
    assert found.certificate is not None
    assert found.certificate.known is not None
    address = "192.0.2.9" if host in ("0.0.0.0", "::") else host
    assert found.certificate.known.covers(["board.local", "localhost", "127.0.0.1", address])
    assert "board.local" in found.names
    assert exposed(tmp_path, host=host).pin == found.pin


def test_damaged_keys_do_not_keep_a_node_from_its_mesh(tmp_path: Path) -> None:
    ApiKeys(tmp_path).create("laptop")
    (tmp_path / "edge" / "api-keys").write_text("noise")
    assert exposed(tmp_path, host="192.0.2.1").keys.damage


def test_a_given_certificate_is_used_and_read_again(tmp_path: Path) -> None:
    def make(name: str) -> Certificate:
        return Certificate(
            tmp_path / "c.pem", tmp_path / "k.pem", Names(name, lambda: ("192.0.2.1",))
        )

    make("first")
    ApiKeys(tmp_path).create("laptop")
    given = {"certificate": str(tmp_path / "c.pem"), "key": str(tmp_path / "k.pem")}
    found = exposed(tmp_path, host="192.0.2.1", **given)
    assert found.certificate is not None
    assert "first.local" in found.names
    assert not found.certificate.refresh()
    make("second")
    assert found.certificate.refresh()
    assert found.certificate.known is not None
    assert found.certificate.known.covers(["second.local"])
    (tmp_path / "c.pem").write_text("noise")
    with pytest.raises(EdgeNotSecured, match="no certificate in PEM form"):
        found.certificate.refresh()
    assert found.certificate.known.covers(["second.local"]), "the one before stays in use"
    for file, says in (("c.pem", "no certificate in PEM form"), ("k.pem", "do not go together")):
        (tmp_path / "k.pem").unlink(missing_ok=True)
        make("third")
        (tmp_path / file).write_text("noise")
        with pytest.raises(EdgeNotSecured, match=says):
            exposed(tmp_path, host="192.0.2.1", **given)
    make("fourth")
    (tmp_path / "k.pem").chmod(0o644)
    with pytest.raises(EdgeNotSecured, match="chmod o="):
        exposed(tmp_path, host="192.0.2.1", **given)


def test_use_is_written_at_the_end(tmp_path: Path) -> None:
    keys = ApiKeys(tmp_path)
    _, text = keys.create("laptop")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Exposure(keys).run)
            await trio.lowlevel.checkpoint()
            keys.verify(text)
            nursery.cancel_scope.cancel()

    trio.run(main)
    ((_, used),) = ApiKeys(tmp_path).listed()
    assert used.count == 1
