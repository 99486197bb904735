"""The model's side of a split: the devices of other nodes, put into llama.cpp's parameters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

from meshd_plugins.builtin.llama.arguments import RemotePart
from meshd_plugins.builtin.llama.worker.rpc_binding import RpcLibrary
from meshd_plugins.builtin.llama.worker.rpc_socket import check_loopback, listen_for_own
from meshd_plugins.workerkit import Message

DEVICES_MAX: Final = 16  # GGML_RPC_MAX_SERVERS, and what llama.cpp reads of shares at least
STAYS_HERE: Final = rb"^(token_embd|output)"
"""Tensors that this machine keeps. What stands after the last layer makes logits: on the other side they
would come back with each token, hundreds of kilobytes instead of a few."""


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffers", ctypes.c_void_p))


def split_over(parameters: Any, parts: Sequence[RemotePart], isolation: Message) -> tuple[Any, ...]:
    """Connect to the parts and let llama.cpp put its layers there; what must live as long as the model.

    Raises NoLoopback, RpcUnavailable. A connection that breaks aborts the process, now and later.
    """
    check_loopback(isolation)
    library = RpcLibrary()
    devices = [library.connect(listen_for_own(part.socket)) for part in parts]
    array = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
    shares = (ctypes.c_float * DEVICES_MAX)(*shares_of([part.layers for part in parts]))
    kept = (_Override * 2)(_Override(STAYS_HERE, library.host_buffers()), _Override(None, None))
    parameters.devices = ctypes.cast(array, ctypes.c_void_p)
    parameters.tensor_split = shares
    parameters.tensor_buft_overrides = ctypes.cast(kept, ctypes.c_void_p)
    parameters.n_gpu_layers = sum(part.layers for part in parts) + 1
    return library, array, shares, kept


def shares_of(layers: Sequence[int]) -> list[float]:
    """What to tell llama.cpp so that each device gets exactly so many of the last layers.

    It counts what stands after the repeated layers as one more, which the last device gets, and puts layer
    j of n on the first device whose cumulative share of the sum is above j / n: half a layer less before each
    boundary keeps rounding out of it.
    """
    shares = [float(count) for count in layers]
    shares[0] -= 0.5
    shares[-1] += 1.5
    return shares
