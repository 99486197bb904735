"""The RPC backend of ggml, as far as llama-cpp-python does not bind it.

Both ends speak plain TCP without any check of who is there, and abort the process on what they do not
expect: so both run in processes that have nothing but a loopback of their own (decision 0030).
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

CPU_TYPE: Final = 0  # enum ggml_backend_dev_type of ggml-backend.h
GPU_TYPES: Final = (1, 2)  # with memory of its own, and without


class RpcUnavailable(Exception):
    """The library was built without RPC, or is not there. The message is for people."""


@dataclass(frozen=True, slots=True)
class Device:
    """Something that computes, with memory."""

    pointer: int
    name: str
    description: str
    is_gpu: bool
    free_bytes: int
    total_bytes: int


class RpcLibrary:
    """The functions, with their types."""

    def __init__(self) -> None:
        """Load them. Raises RpcUnavailable."""
        folder = _library_folder()
        try:
            self._base: Any = ctypes.CDLL(str(folder / "libggml-base.so"))
            self._ggml: Any = ctypes.CDLL(str(folder / "libggml.so"))
            self._rpc: Any = ctypes.CDLL(str(folder / "libggml-rpc.so"))
        except OSError as error:
            raise RpcUnavailable(
                f"{error}: llama-cpp-python must be built with GGML_RPC=on"
            ) from None
        text, pointer, size = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
        for library, name, result, arguments in (
            (self._base, "ggml_version", text, []),
            (self._base, "ggml_commit", text, []),
            (self._base, "ggml_backend_dev_name", text, [pointer]),
            (self._base, "ggml_backend_dev_description", text, [pointer]),
            (self._base, "ggml_backend_dev_type", ctypes.c_int, [pointer]),
            (self._base, "ggml_backend_dev_memory", None, [pointer, pointer, pointer]),
            (self._base, "ggml_backend_reg_dev_get", pointer, [pointer, size]),
            (self._base, "ggml_backend_cpu_buffer_type", pointer, []),
            (self._ggml, "ggml_backend_dev_count", size, []),
            (self._ggml, "ggml_backend_dev_get", pointer, [size]),
            (self._rpc, "ggml_backend_rpc_init", pointer, [text, ctypes.c_uint32]),
            (self._rpc, "ggml_backend_rpc_add_server", pointer, [text]),
            (
                self._rpc,
                "ggml_backend_rpc_start_server",
                None,
                [text, text, size, size, pointer],
            ),
        ):
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise RpcUnavailable(f"another release of llama-cpp-python: {error}") from None
            function.restype, function.argtypes = result, arguments

    @property
    def build(self) -> str:
        """What both ends must have in common: graphs are sent as numbers of operations."""
        version, commit = self._base.ggml_version(), self._base.ggml_commit()
        return f"{version.decode()}-{commit.decode()}"

    def devices(self) -> list[Device]:
        """What this machine has, as ggml orders it."""
        count = int(self._ggml.ggml_backend_dev_count())
        return [self._device(self._ggml.ggml_backend_dev_get(n)) for n in range(count)]

    def _device(self, pointer: int) -> Device:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._base.ggml_backend_dev_memory(pointer, ctypes.byref(free), ctypes.byref(total))
        return Device(
            pointer=pointer,
            name=self._base.ggml_backend_dev_name(pointer).decode("utf-8", "replace"),
            description=self._base.ggml_backend_dev_description(pointer).decode("utf-8", "replace"),
            is_gpu=int(self._base.ggml_backend_dev_type(pointer)) in GPU_TYPES,
            free_bytes=int(free.value),
            total_bytes=int(total.value),
        )

    def serve(self, port: int, threads: int, device: Device) -> None:
        """Compute for whoever connects, one after the other. Returns only when it cannot."""
        devices = (ctypes.c_void_p * 1)(device.pointer)
        endpoint = f"127.0.0.1:{port}".encode()
        self._rpc.ggml_backend_rpc_start_server(endpoint, None, threads, 1, devices)

    def connect(self, port: int) -> int:
        """Connect to a server; the device to compute with. Aborts the process if nobody is there.

        The backend that is made keeps the connection for the life of the process: without it ggml opens one
        for each question.
        """
        endpoint = f"127.0.0.1:{port}".encode()
        if not self._rpc.ggml_backend_rpc_init(endpoint, 0):
            raise RpcUnavailable("ggml made no backend of the connection")
        server = self._rpc.ggml_backend_rpc_add_server(endpoint)
        if not server:
            raise RpcUnavailable("the other end has no device")
        return int(self._base.ggml_backend_reg_dev_get(server, 0))

    def host_buffers(self) -> int:
        """Where a tensor goes that is to stay in this machine's own memory."""
        return int(self._base.ggml_backend_cpu_buffer_type())


def rpc_build() -> str:
    """Of the library here; "" where it has no RPC."""
    try:
        return RpcLibrary().build
    except RpcUnavailable:
        return ""


def _library_folder() -> Path:
    package = sys.modules.get("llama_cpp")  # `import_low_level` leaves no spec there
    if package is not None:
        return Path(package.__path__[0]) / "lib"
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        raise RpcUnavailable("llama-cpp-python is not installed")
    return Path(spec.submodule_search_locations[0]) / "lib"
