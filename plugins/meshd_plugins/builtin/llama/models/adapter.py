"""Whether a LoRA adapter is made for a model: its header against the model's, before llama.cpp sees it.

llama.cpp checks most of this too, and aborts on the rest. Pure.
"""

from __future__ import annotations

from typing import Final

from meshd_plugins.builtin.llama.models.gguf import Gguf, GgufArray, Tensor

_A, _B, _NORM = ".lora_a", ".lora_b", "_norm.weight"
_EMBEDDING: Final = "token_embd.weight"
_MATRIX: Final = 2


class AdapterMismatch(Exception):
    """This adapter cannot be put on this model. The message is for people."""

    code = "adapter_mismatch"


def check_adapter(model: Gguf, adapter: Gguf) -> None:
    """Compare headers. Raises AdapterMismatch."""
    if adapter.text("general.type") != "adapter" or adapter.text("adapter.type") != "lora":
        raise AdapterMismatch("it is no LoRA adapter, or one in another form than llama.cpp's")
    ours, theirs = (each.text("general.architecture") for each in (model, adapter))
    if ours != theirs:
        raise AdapterMismatch(f"it is made for {theirs[:40]!r}, and the model is {ours[:40]!r}")
    if not isinstance(adapter.metadata.get("adapter.lora.alpha", 0.0), float):
        raise AdapterMismatch("its adapter.lora.alpha is no number")
    if isinstance(adapter.metadata.get("adapter.alora.invocation_tokens"), GgufArray):
        raise AdapterMismatch("it wants to be switched on by words (aLoRA), which is not done here")
    tensors = {tensor.name: tensor for tensor in model.tensors}
    halves = {tensor.name: tensor for tensor in adapter.tensors}
    for name in halves:
        if not name.endswith((_A, _B, _NORM)):
            raise AdapterMismatch(f"its tensor {name[:80]!r} is none of a LoRA adapter")
    names = {name[: -len(_A)] for name in halves if name.endswith((_A, _B))}
    if not names:
        raise AdapterMismatch("it changes nothing: it has no tensors")
    for name in sorted(names):
        base, a, b = tensors.get(name), halves.get(name + _A), halves.get(name + _B)
        if base is None:
            raise AdapterMismatch(
                f"it changes {name[:80]!r}, which the model has not: it is made for another one"
            )
        if a is None or b is None or not _fits(base, a, b):
            raise AdapterMismatch(
                f"its tensors for {name[:80]!r} do not fit the model's: it is made for another one"
            )


def _fits(base: Tensor, a: Tensor, b: Tensor) -> bool:
    if any(len(each.shape) != _MATRIX for each in (base, a, b)):
        return False
    if base.name.endswith(_EMBEDDING):  # stored the other way round
        return base.shape == (b.shape[1], a.shape[1]) and a.shape[0] == b.shape[0]
    return base.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
