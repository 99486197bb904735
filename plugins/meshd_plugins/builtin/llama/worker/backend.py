"""llama.cpp behind the scheduler's `Backend`: one model, one context, one reused batch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshd_plugins.builtin.llama.engine.scheduler import BackendRefused, Row
from meshd_plugins.builtin.llama.sampling import Sampling
from meshd_plugins.builtin.llama.worker.low_level import import_low_level
from meshd_plugins.builtin.llama.worker.samplers import Samplers
from meshd_plugins.builtin.llama.worker.vocabulary import Vocabulary

BATCH_TOKENS_MAX: Final = 512
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
        self.vocabulary = Vocabulary(api, self._model)
        self.samplers = Samplers(api, self.vocabulary)
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
        """Make the sampler of one job: a pointer."""
        return self.samplers.new(sampling)

    def sample(self, sampler: Any, row: int) -> int:
        """Choose the token that follows a row of the last batch, and let the penalties know."""
        return int(self._api.llama_sampler_sample(sampler, self._context, row))

    def free_sampler(self, sampler: Any) -> None:
        """Give a chain back, with all that is in it."""
        self.samplers.free(sampler)

    def forget(self, slot: int) -> None:
        """Empty the memory of a slot."""
        self._api.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; control tokens have none."""
        return self.vocabulary.piece(token)

    def ends_text(self, token: int) -> bool:
        """Whether the token means that the answer is complete."""
        return self.vocabulary.ends_text(token)

    # -- text --------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str:
        """The model's own template, "" when it has none."""
        template = self._api.llama_model_chat_template(self._model, None)
        return str(template.decode("utf-8", "replace")) if template else ""


def _log(level: int, text: bytes, _data: object) -> None:
    """Let warnings and errors of llama.cpp through to stderr, where the daemon keeps the last lines."""
    if level in (_LOG_WARN, _LOG_ERROR):
        os.write(2, text)
