"""llama.cpp behind the scheduler's `Backend`: one model, one context, one reused batch.

Only the low-level module of llama-cpp-python is used. It is imported without its package's
`__init__`, which would load the high-level API (numpy, disk caches, chat formats): four times the
start-up time and some 30 MiB that nothing here uses.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshd_plugins.builtin.llama.engine import BackendRefused, Row
from meshd_plugins.builtin.llama.sampling import PENALTY_WINDOW_TOKENS, Sampling

BATCH_TOKENS_MAX: Final = 512
PIECE_BYTES_MAX: Final = 256
DECODE_NO_SLOT: Final = 1
_LOG_WARN, _LOG_ERROR = (
    3,
    4,
)  # ggml_log_level of ggml.h (llama-cpp-python's own table is off by one)


class ModelUnusable(Exception):
    """llama.cpp does not take this model. The message is for people; details are on stderr."""


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """How a model is loaded."""

    path: str  # /proc/self/fd/N: the very file that was verified
    slots: int
    context_tokens: int  # of one slot
    threads: int  # 0: one a physical core
    gpu_layers: int  # -1: all that fit the device


def import_low_level() -> Any:
    """Return llama_cpp.llama_cpp. Raises ImportError."""
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("llama_cpp is not installed")
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


def physical_cores() -> int:
    """Cores that this process may run on, hyper-threads counted once: more threads only get in the way."""
    allowed = os.sched_getaffinity(0)
    cores: set[str] = set()
    for cpu in sorted(allowed):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(path.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


class LlamaBackend:
    """Implements `Backend`; a sampler is the pointer to a chain."""

    def __init__(self, config: BackendConfig) -> None:
        """Load the model and make its context. Raises ModelUnusable."""
        self._api = api = import_low_level()
        self._log_callback = api.llama_log_callback(_log)  # must outlive the library's use of it
        api.llama_log_set(self._log_callback, ctypes.c_void_p(0))
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = config.gpu_layers
        self._model = api.llama_model_load_from_file(os.fsencode(config.path), parameters)
        if not self._model:
            raise ModelUnusable("llama.cpp cannot load it")
        self._vocabulary = api.llama_model_get_vocab(self._model)
        self._vocabulary_size = int(api.llama_vocab_n_tokens(self._vocabulary))
        self.threads = config.threads or physical_cores()
        options = api.llama_context_default_params()
        options.n_ctx = config.context_tokens * config.slots
        options.n_seq_max = config.slots
        options.n_batch = BATCH_TOKENS_MAX
        options.n_ubatch = BATCH_TOKENS_MAX
        options.n_outputs_max = max(
            config.slots, 1
        )  # rows of logits kept; the default is one a batch token
        options.n_threads = options.n_threads_batch = self.threads
        options.no_perf = True
        self._context = api.llama_init_from_model(self._model, options)
        if not self._context:
            raise ModelUnusable(f"no memory for a context of {options.n_ctx} tokens")
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(BATCH_TOKENS_MAX, 0, 1)
        self._slots = config.slots
        self._piece_buffer = ctypes.create_string_buffer(PIECE_BYTES_MAX)
        self._pieces: dict[int, bytes] = {}

    @property
    def context_tokens(self) -> int:
        """Tokens that one slot holds."""
        return int(self._api.llama_n_ctx(self._context)) // self._slots

    @property
    def build(self) -> str:
        """What was built, for the compatibility of KV state."""
        return (
            str(self._api.llama_version().decode()) if hasattr(self._api, "llama_version") else ""
        )

    @property
    def system(self) -> str:
        """Instruction sets and devices in use, as llama.cpp lists them."""
        return str(self._api.llama_print_system_info().decode("utf-8", "replace"))

    # -- Backend ---------------------------------------------------------------------------------------

    def decode(self, rows: Sequence[Row]) -> None:
        """Compute one batch. Raises BackendRefused; RuntimeError when the context is lost."""
        batch = self._batch
        assert len(rows) <= BATCH_TOKENS_MAX
        for index, row in enumerate(rows):
            batch.token[index] = row.token
            batch.pos[index] = row.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row.slot
            batch.logits[index] = row.output
        batch.n_tokens = len(rows)
        status = self._api.llama_decode(self._context, batch)
        if status == DECODE_NO_SLOT:
            raise BackendRefused("the context is full")
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def new_sampler(self, sampling: Sampling) -> Any:
        """Build the chain: biases, penalties, cuts, temperature, and the choice."""
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            api.llama_sampler_chain_add(chain, sampler)

        biases = [
            (token, bias) for token, bias in sampling.logit_bias if token < self._vocabulary_size
        ]
        if biases:
            array = (api.llama_logit_bias * len(biases))()
            for index, (token, bias) in enumerate(biases):
                array[index].token, array[index].bias = token, bias
            add(api.llama_sampler_init_logit_bias(self._vocabulary_size, len(biases), array))
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if penalties != (1.0, 0.0, 0.0):
            add(self._penalties(*penalties))
        if sampling.temperature == 0.0:
            add(api.llama_sampler_init_greedy())
            return chain
        if sampling.top_k > 0:
            add(api.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1.0:
            add(api.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0.0:
            add(api.llama_sampler_init_min_p(sampling.min_p, 1))
        add(api.llama_sampler_init_temp(sampling.temperature))
        add(api.llama_sampler_init_dist(sampling.seed))
        return chain

    def _penalties(self, repeat: float, frequency: float, presence: float) -> Any:
        make = self._api.llama_sampler_init_penalties
        arguments = (PENALTY_WINDOW_TOKENS, repeat, frequency, presence)
        # Newer llama.cpp wants the size of the vocabulary first.
        return (
            make(self._vocabulary_size, *arguments)
            if len(make.argtypes) > len(arguments)
            else make(*arguments)
        )

    def sample(self, sampler: Any, row: int) -> int:
        """Choose the token that follows a row of the last batch, and let the penalties know."""
        return int(self._api.llama_sampler_sample(sampler, self._context, row))

    def free_sampler(self, sampler: Any) -> None:
        """Give a chain back, with all that is in it."""
        self._api.llama_sampler_free(sampler)

    def forget(self, slot: int) -> None:
        """Empty the memory of a slot."""
        self._api.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; control tokens have none."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._convert(token, special=False)
        return known

    def ends_text(self, token: int) -> bool:
        """Whether the token means that the answer is complete."""
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token))

    # -- text --------------------------------------------------------------------------------------------

    def _convert(self, token: int, *, special: bool) -> bytes:
        buffer = self._piece_buffer
        length = self._api.llama_token_to_piece(
            self._vocabulary, token, buffer, len(buffer), 0, special
        )
        if length < 0:  # a longer token than any known vocabulary has
            buffer = ctypes.create_string_buffer(-length)
            length = self._api.llama_token_to_piece(
                self._vocabulary, token, buffer, len(buffer), 0, special
            )
        return buffer.raw[: max(length, 0)]

    def tokenise(self, pieces: Sequence[str], *, parse_special: bool) -> list[int]:
        """Return the tokens of a prompt, in pieces between which no token reaches.

        A beginning-of-text token that the first piece has already is not doubled.
        """
        beginning = self.special_tokens["bos_token"]
        add_special = not (
            parse_special and beginning and "".join(pieces[:1]).startswith(beginning)
        )
        tokens: list[int] = []
        for piece in pieces:
            data = piece.encode()
            room = len(data) + 8
            found = (self._api.llama_token * room)()
            count = self._api.llama_tokenize(
                self._vocabulary, data, len(data), found, room, add_special, parse_special
            )
            assert count >= 0, "a token has at least one byte"
            tokens += found[:count]
            add_special = False
        return tokens

    def control_tokens(self) -> list[str]:
        """Texts of the tokens that steer the model and that no user may write."""
        api, vocabulary = self._api, self._vocabulary
        steering = api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_UNKNOWN
        return [
            self._convert(token, special=True).decode("utf-8", "replace")
            for token in range(self._vocabulary_size)
            if api.llama_vocab_get_attr(vocabulary, token) & steering
        ]

    @property
    def special_tokens(self) -> dict[str, str]:
        """Text of the tokens that chat templates name."""
        ids = {
            "bos_token": self._api.llama_vocab_bos(self._vocabulary),
            "eos_token": self._api.llama_vocab_eos(self._vocabulary),
        }
        return {
            name: self._convert(token, special=True).decode("utf-8", "replace")
            if token >= 0
            else ""
            for name, token in ids.items()
        }

    @property
    def chat_template(self) -> str:
        """The model's own template, "" when it has none."""
        template = self._api.llama_model_chat_template(self._model, None)
        return str(template.decode("utf-8", "replace")) if template else ""


def _log(level: int, text: bytes, _data: object) -> None:
    """Let warnings and errors of llama.cpp through to stderr, where the daemon keeps the last lines."""
    if level in (_LOG_WARN, _LOG_ERROR):
        os.write(2, text)
