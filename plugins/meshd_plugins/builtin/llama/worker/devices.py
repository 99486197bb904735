"""The accelerators that ggml can use, with their memory; none in a build for the processor alone."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from typing import Any, Final

from meshd_plugins.api import Value

DEVICES_MAX: Final = 64
_KINDS: Final = {
    1: "gpu",
    2: "igpu",
}  # ggml_backend_dev_type: what has memory, or shares the machine's
_TEXT_LENGTH_MAX: Final = 80


def list_devices() -> list[Value]:
    """Maps of name, kind ("gpu", or "igpu" that shares the machine's memory), free_bytes, total_bytes."""
    base, registry = _libraries()
    if registry is None:
        return []
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    registry.ggml_backend_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_dev_description.restype = ctypes.c_char_p
    found: list[Value] = []
    for number in range(min(registry.ggml_backend_dev_count(), DEVICES_MAX)):
        device = ctypes.c_void_p(registry.ggml_backend_dev_get(ctypes.c_size_t(number)))
        kind = _KINDS.get(base.ggml_backend_dev_type(device))
        if kind is None:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name = bytes(base.ggml_backend_dev_description(device) or b"").decode("utf-8", "replace")
        found.append(
            {
                "name": name[:_TEXT_LENGTH_MAX],
                "kind": kind,
                "free_bytes": free.value,
                "total_bytes": total.value,
            }
        )
    return found


def _libraries() -> tuple[Any, Any]:
    """ggml's, as they ship with llama-cpp-python; None where they cannot be loaded."""
    for folder in _folders():
        library = Path(folder) / "lib"
        try:
            return ctypes.CDLL(str(library / "libggml-base.so")), ctypes.CDLL(
                str(library / "libggml.so")
            )
        except OSError:
            continue
    return None, None


def _folders() -> list[str]:
    """Where llama-cpp-python lies; asked for anew only where `low_level` has not imported it."""
    if (module := sys.modules.get("llama_cpp")) is not None:
        return list(module.__path__)
    spec = importlib.util.find_spec("llama_cpp")
    return list((spec.submodule_search_locations if spec else None) or ())
