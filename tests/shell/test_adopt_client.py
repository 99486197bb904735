"""The HTTP client of the adopting plugin: TLS, keys, and addresses that are not what they say."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.shell.support_adopt_servers import FakeServer, answering, running

from meshd_plugins.builtin.adopt.client import Client, make_client
from meshd_plugins.builtin.adopt.config import Address
from meshd_plugins.builtin.adopt.errors import Unreachable


def certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


async def get(client: Client) -> int:
    with trio.fail_after(10):
        async with client.exchange("GET", "/v1/models") as response:
            await response.read(10_000)
            return response.status


def test_tls_is_checked_against_the_named_authority(tmp_path: Path) -> None:
    path = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    server = FakeServer({"GET /v1/models": answering({"data": []})})

    async def main() -> None:
        async with running(server, tls=context):
            address = Address("https", "127.0.0.1", server.port)
            assert await get(make_client(address, "", str(path))) == 200
            with pytest.raises(Unreachable, match="certificate"):
                await get(make_client(address, "", ""))
            with pytest.raises(Unreachable):  # its name is not in the certificate
                await get(make_client(Address("https", "localhost", server.port), "", str(path)))
        async with running(server):
            address = Address("https", "127.0.0.1", server.port)
            with pytest.raises(Unreachable, match="TLS"):
                await get(make_client(address, "", str(path)))

    trio.run(main)


def test_the_first_line_of_the_key_file_is_the_key(tmp_path: Path) -> None:
    server = FakeServer({"GET /v1/models": answering({})})
    file = tmp_path / "key"
    file.write_text("  sk-1 \nsecond line\n")

    async def main() -> None:
        async with running(server):
            address = Address("http", "127.0.0.1", server.port)
            assert await get(make_client(address, str(file), "")) == 200
        assert server.asked[0].headers["authorization"] == "Bearer sk-1"

    trio.run(main)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", "schlüssel".encode(), b"a\tb"])
def test_a_file_without_a_key_is_refused_without_quoting_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"key|decode") as raised:
        make_client(Address("http", "127.0.0.1", 1), str(file), "")
    assert "schl" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    [
        Address("http", "127.0.0.1", 1),
        Address("https", "127.0.0.1", 1),
        Address("http", "x" * 300, 80),
        Address("http", "nowhere.invalid", 80),
    ],
)
def test_what_is_not_there_is_told_shortly(address: Address) -> None:
    async def main() -> None:
        with pytest.raises(Unreachable) as raised:
            await get(Client(address))
        assert str(raised.value).startswith(f"{address} does not answer: ")

    trio.run(main)


class HostsFile(trio.abc.HostnameResolver):
    """Says of every name that it is one address."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def getaddrinfo(self, host: object, port: object, *_more: object, **_kw: object) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (self._address, port))]

    async def getnameinfo(self, sockaddr: object, flags: object) -> Any:
        raise NotImplementedError


def test_what_is_said_to_be_on_this_machine_is() -> None:
    """The hosts file may say anything of localhost; a request that is to stay here does not leave."""
    beyond = [
        each.address
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family == socket.AF_INET and not each.address.startswith("127.")
    ]
    if not beyond:
        pytest.skip("this machine has no address beyond loopback")
    server = FakeServer({"GET /v1/models": answering({})})

    async def main() -> None:
        async with running(server, host=beyond[0]):
            trio.socket.set_custom_hostname_resolver(HostsFile(beyond[0]))
            with pytest.raises(Unreachable, match="not on this machine"):
                await get(Client(Address("http", "localhost", server.port)))
            assert await get(Client(Address("http", "board", server.port))) == 200
        assert len(server.asked) == 1

    trio.run(main)
