"""A model hub of few scruples on loopback, and small models to fetch from it."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import re
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.unit.support_gguf import ENTRIES, TENSORS, entry, flag, gguf, number, text, word

HEAD_BYTES_MAX = 65536
UINT16, INT32, UINT64, STRING = 2, 5, 10, 8


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that came."""

    path: str
    headers: dict[str, str]

    @property
    def begin(self) -> int:
        """From where on the file is wanted."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection is reset."""


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing comes any more, until the hub is closed."""


Piece = bytes | Cut | Silence
Answer = Callable[[Asked], Iterable[Piece]]


def head(status: int, **headers: object) -> bytes:
    """The head of an answer; keywords are header names with _ for -."""
    lines = [f"HTTP/1.1 {status} As-It-Is", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass
class Honest:
    """Serves one content, parts of it too, as a good server does."""

    content: bytes
    etag: str = '"one"'
    extra: dict[str, object] = field(default_factory=dict)

    def __call__(self, asked: Asked) -> Iterable[Piece]:
        size, begin = len(self.content), asked.begin
        if begin and asked.headers.get("if-range", self.etag) == self.etag:
            if begin >= size:
                yield head(416, Content_Range=f"bytes */{size}", Content_Length=0)
                return
            span = f"bytes {begin}-{size - 1}/{size}"
            yield head(
                206, Content_Range=span, Content_Length=size - begin, ETag=self.etag, **self.extra
            )
            yield self.content[begin:]
            return
        yield head(200, Content_Length=size, ETag=self.etag, **self.extra)
        yield self.content


def shortened(answer: Answer, count: int, end: Piece) -> Answer:
    """The same, but after so many bytes of the body comes `end`."""

    def shorter(asked: Asked) -> Iterable[Piece]:
        first, *rest = answer(asked)
        yield first
        body = b"".join(piece for piece in rest if isinstance(piece, bytes))
        yield body[:count]
        yield end

    return shorter


class Hub:
    """Answers the n-th request with the n-th answer, and all after the last with the last."""

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None) -> None:
        self._answers = list(answers)
        self._tls = tls
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.asked: list[Asked] = []
        hub = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                hub._handle(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it is."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://127.0.0.1:{self._server.server_address[1]}"

    def now(self, *answers: Answer) -> None:
        """Answer like this from now on."""
        with self._lock:
            self._answers = list(answers)

    def _handle(self, sock: socket.socket) -> None:
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with sock:
                self._answer(sock)
        except OSError:
            pass  # the client went, or did not like the certificate

    def _answer(self, sock: socket.socket) -> None:
        raw = b""
        while b"\r\n\r\n" not in raw and len(raw) < HEAD_BYTES_MAX:
            received = sock.recv(4096)
            if not received:
                return
            raw += received
        request, *lines = raw.split(b"\r\n\r\n")[0].decode().split("\r\n")
        headers = {
            key.lower(): value.strip() for key, _, value in (x.partition(":") for x in lines)
        }
        asked = Asked(request.split(" ")[1], headers)
        with self._lock:
            self.asked.append(asked)
            answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        for piece in answer(asked):
            match piece:
                case bytes():
                    sock.sendall(piece)
                case Cut():
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                case Silence():
                    self._closing.wait()
                    return


def redirect(to: str, status: int = 302, **headers: object) -> Answer:
    """Sends everybody elsewhere."""
    return lambda _asked: [head(status, Location=to, Content_Length=0, **headers)]


def certificate(folder: Path, *names: str) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for 127.0.0.1 (or other names), and the file that makes it trusted."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a hub for tests")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = [x509.DNSName(each) for each in names]
    alternatives = alternatives or [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    both = folder / "both.pem"
    public = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    both.write_bytes(private + public)
    trusted = folder / "trusted.pem"
    trusted.write_bytes(public)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return context, trusted


# -- models ------------------------------------------------------------------------------------------------


def model(size_bytes: int = 0, seed: int = 1) -> bytes:
    """A file that reads like a model, with so many bytes of data behind its two tensors."""
    filler = struct.pack("<I", seed) * (size_bytes // 4)
    return gguf() + filler


def adapter() -> bytes:
    """A LoRA adapter."""
    return gguf((*ENTRIES, entry("general.type", STRING, text("adapter"))))


def reading_model(width: int, size_bytes: int = 0) -> bytes:
    """A model whose embeddings have so many values."""
    filler = b"\x01" * size_bytes
    return gguf((*ENTRIES, number("llama.embedding_length", width))) + filler


def encoder(pooling: int) -> bytes:
    """A model that makes vectors, or scores."""
    entries = (word("general.architecture", "bert"), number("bert.pooling_type", pooling))
    return gguf(entries, (*TENSORS, text("cls.weight") + struct.pack("<IQIQ", 1, 8, 0, 96)))


def projector(width: int, *, sound: bool = False) -> bytes:
    """What has a model with embeddings of so many values read pictures, or sound."""
    name = "audio" if sound else "vision"
    entries = (
        word("general.architecture", "clip"),
        flag(f"clip.has_{name}_encoder", True),
        word("clip.projector_type", "idefics3"),
        number(f"clip.{name}.projection_dim", width),
    )
    return gguf(entries)


def digest(content: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(content).hexdigest()


def split_model() -> tuple[bytes, bytes]:
    """A model of two tensors in two parts, as `llama-gguf-split` writes it."""
    marks = [
        (
            entry("split.no", UINT16, struct.pack("<H", number)),
            entry("split.count", UINT16, struct.pack("<H", 2)),
            entry("split.tensors.count", INT32, struct.pack("<i", 2)),
        )
        for number in range(2)
    ]
    second = text("output_norm.weight") + struct.pack("<IQIQ", 1, 64, 0, 0)
    one = gguf((*ENTRIES, *marks[0]), (TENSORS[0],), data_bytes=0) + bytes(range(80)) + b"\0" * 16
    two = gguf(marks[1], (second,), data_bytes=0) + bytes(reversed(range(256)))
    return one, two
