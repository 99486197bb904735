"""LoRA adapters: checked by their headers, loaded by llama.cpp, put on a context for good."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from meshd_plugins.builtin.llama.arguments import Adapter
from meshd_plugins.builtin.llama.models.adapter import AdapterMismatch, check_adapter
from meshd_plugins.builtin.llama.models.gguf import Gguf, GgufError, read_gguf


def check_adapters(model: Gguf, adapters: Sequence[Adapter]) -> None:
    """Read and compare the headers. Raises AdapterMismatch."""
    for adapter in adapters:
        try:
            check_adapter(model, read_gguf(adapter.file))
        except (GgufError, AdapterMismatch) as error:
            raise AdapterMismatch(f"the adapter {adapter.path} cannot be used: {error}") from None


def put_on(api: Any, model: Any, context: Any, adapters: Sequence[Adapter]) -> None:
    """Have every step of a context computed with the adapters. Raises AdapterMismatch."""
    count = len(adapters)
    if not count:
        return
    loaded = (api.llama_adapter_lora_p_ctypes * count)()
    for number, adapter in enumerate(adapters):
        found = api.llama_adapter_lora_init(model, f"/proc/self/fd/{adapter.file}".encode())
        if not found:
            raise AdapterMismatch(
                f"the adapter {adapter.path} cannot be used: llama.cpp refuses it"
            )
        loaded[number] = ctypes.cast(found, api.llama_adapter_lora_p_ctypes)
    scales = (ctypes.c_float * count)(*(adapter.scale for adapter in adapters))
    if api.llama_set_adapters_lora(context, loaded, count, scales) != 0:
        raise AdapterMismatch("llama.cpp does not put the adapters on this model")
