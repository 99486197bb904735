"""llama.cpp behind the scheduler's `Backend`: one model, one context, one reused batch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.arguments import Adapter, RemotePart
from meshd_plugins.builtin.llama.engine.jobs import BackendRefused, Row
from meshd_plugins.builtin.llama.engine.text import Logprob
from meshd_plugins.builtin.llama.sampling import Sampling
from meshd_plugins.builtin.llama.worker.adapters import put_on
from meshd_plugins.builtin.llama.worker.crowding import Stopwatch, Threads
from meshd_plugins.builtin.llama.worker.devices import list_devices
from meshd_plugins.builtin.llama.worker.kv_layout import Layout, LayoutError, learn_layout
from meshd_plugins.builtin.llama.worker.low_level import import_low_level
from meshd_plugins.builtin.llama.worker.media_batch import MediaBatch, MediaTable
from meshd_plugins.builtin.llama.worker.mtmd import MediaEncoder, ProjectorUnusable
from meshd_plugins.builtin.llama.worker.rpc_client import split_over
from meshd_plugins.builtin.llama.worker.samplers import Samplers
from meshd_plugins.builtin.llama.worker.vocabulary import Vocabulary
from meshd_plugins.workerkit import Message

BATCH_TOKENS_MAX: Final = 512
DECODE_NO_SLOT: Final = 1
FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}  # llama_flash_attn_type
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
    batch_tokens: int = BATCH_TOKENS_MAX  # of one step at most
    flash_attention: str = "auto"  # or on, off
    adapters: tuple[Adapter, ...] = ()  # LoRA, always on
    projector: str = ""  # of pictures and sounds, as `path`; "": none
    parts: tuple[RemotePart, ...] = ()  # what other nodes hold
    isolation: Message = field(
        default_factory=dict[str, Value]
    )  # of this process: they need loopback


@dataclass(frozen=True, slots=True)
class SequenceState:
    """The memory of one sequence as llama.cpp writes it."""

    data: Any  # ctypes array of bytes
    size_bytes: int

    @classmethod
    def of(cls, buffer: bytearray) -> SequenceState:
        """Over a buffer that is not copied, and must not be changed any more."""
        return cls((ctypes.c_uint8 * len(buffer)).from_buffer(buffer), len(buffer))


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
    """Implements `Backend` over llama.cpp."""

    def __init__(self, config: BackendConfig) -> None:
        """Load the model and make its context. Raises ModelUnusable."""
        self._api = api = import_low_level()
        self._log_callback = api.llama_log_callback(_log)  # must outlive the library's use of it
        api.llama_log_set(self._log_callback, ctypes.c_void_p(0))
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = config.gpu_layers
        if config.parts:
            self._remote = split_over(parameters, config.parts, config.isolation)
        self._model = api.llama_model_load_from_file(os.fsencode(config.path), parameters)
        if not self._model:
            raise ModelUnusable("llama.cpp cannot load it")
        self.vocabulary = Vocabulary(api, self._model)
        self.samplers = Samplers(api, self.vocabulary)
        self.threads = config.threads or physical_cores()
        options = api.llama_context_default_params()
        options.n_ctx = config.context_tokens * config.slots
        options.n_seq_max = config.slots
        options.n_batch = options.n_ubatch = self.batch_tokens = config.batch_tokens
        options.flash_attn_type = FLASH_ATTENTION[config.flash_attention]
        options.n_outputs_max = max(
            config.slots, 1
        )  # rows of logits kept; the default is one a batch token
        options.n_threads = options.n_threads_batch = self.threads
        options.no_perf = True
        self._context = api.llama_init_from_model(self._model, options)
        if not self._context:
            raise ModelUnusable(f"no memory for a context of {options.n_ctx} tokens")
        put_on(api, self._model, self._context, config.adapters)
        self._memory = api.llama_get_memory(self._context)
        # A recurrent model and a sliding window have no memory of every past token to go back to.
        self._forgets_parts = not (
            api.llama_model_is_recurrent(self._model)
            or api.llama_model_is_hybrid(self._model)
            or api.llama_model_n_swa(self._model) > 0
        )
        self._batch = api.llama_batch_init(config.batch_tokens, 0, 1)
        self._slots = config.slots
        self._tokens_at: list[
            int
        ] = []  # of each row of the last batch, where it lay among the tokens
        self.offloads = bool(config.parts) or (config.gpu_layers != 0 and bool(list_devices()))
        self.media_encoder = self._load_projector(config) if config.projector else None
        self._media: MediaBatch | None = None
        self.layout: Layout | None = None  # of a sequence's memory; None: it is not handed over
        self._crowding: Threads | None = None

    def _load_projector(self, config: BackendConfig) -> MediaEncoder:
        try:
            return MediaEncoder(
                config.projector,
                self._model,
                self._log_callback,
                max(1, self.threads - 1),  # one stays with the sequences that generate meanwhile
                gpu=self.offloads,
                flash_attention=FLASH_ATTENTION[config.flash_attention],
            )
        except ProjectorUnusable as error:
            raise ModelUnusable(str(error)) from None

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it can take in."""
        return self.media_encoder.modalities if self.media_encoder is not None else ("text",)

    def read_media_from(self, table: MediaTable) -> None:
        """Rows with tokens below zero are looked up there."""
        self._media = MediaBatch(self._api, self._model, self._context, table, self.batch_tokens)

    def adapt_threads(self) -> None:
        """From now on have as many threads as there are processors for (decision 0033).

        Not while the model is read from a disk: threads that wait for one get little processor time too. Nor where
        a GPU computes: what those who wait for it use says nothing of how crowded the processors are.
        """
        if not self.offloads:
            self._crowding = Threads(self.threads, self._use_threads)

    @property
    def threads_now(self) -> int:
        """Threads that compute the next batch."""
        return self._crowding.now if self._crowding is not None else self.threads

    def leave_threads(self, threads: int) -> None:
        """Leave so many to something else in this process, until it is called with 0."""
        if self._crowding is not None:
            self._crowding.leave(threads)

    def _use_threads(self, threads: int) -> None:
        self._api.llama_set_n_threads(self._context, threads, threads)

    def close(self) -> None:
        """Give everything back; samplers must have been freed."""
        if self.media_encoder is not None:
            self.media_encoder.close()
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

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
        if any(row.token < 0 for row in rows):
            rows = self._decode_media(rows)
        else:
            self._tokens_at = []
        if rows:
            self._decode_tokens(rows)

    def _decode_media(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Compute what is not tokens, and return the rest. What is sampled from must be computed last."""
        assert self._media is not None, "only requests with media have such tokens"
        media = [row for row in rows if row.token < 0]
        assert not any(row.output for row in media), "a prompt does not end with a medium"
        self._done(self._media.decode(media))
        self._tokens_at, tokens = [], 0
        for row in rows:
            self._tokens_at.append(tokens)
            tokens += row.token >= 0
        return [row for row in rows if row.token >= 0]

    def _decode_tokens(self, rows: Sequence[Row]) -> None:
        batch = self._batch
        assert len(rows) <= self.batch_tokens
        for index, row in enumerate(rows):
            batch.token[index] = row.token
            batch.pos[index] = row.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row.slot
            batch.logits[index] = row.output
        batch.n_tokens = len(rows)
        watch = Stopwatch()
        status = self._api.llama_decode(self._context, batch)
        if self._crowding is not None:
            self._crowding.stepped(*watch.read())
        self._done(status)

    @staticmethod
    def _done(status: int) -> None:
        if status == DECODE_NO_SLOT:
            raise BackendRefused("the context is full")
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def new_sampler(self, sampling: Sampling) -> Any:
        """Make the sampler of one job. Raises GrammarUnusable."""
        return self.samplers.new(sampling)

    def sample(self, sampler: Any, row: int) -> int:
        """Choose the token that follows a row of the last batch, and let the penalties know."""
        return self.samplers.sample(sampler, self._context, self._output(row))

    def free_sampler(self, sampler: Any) -> None:
        """Give a chain back, with all that is in it."""
        self.samplers.free(sampler)

    def logprob(self, row: int, token: int, count: int) -> Logprob:
        """How likely the token was at a row of the last batch, and the `count` likeliest beside it."""
        return self.samplers.logprob(self._context, self._output(row), token, count)

    def _output(self, row: int) -> int:
        """Where llama.cpp has the output of a row: it knows the tokens of the last batch only."""
        return self._tokens_at[row] if self._tokens_at else row

    def keep(self, slot: int, positions: int) -> bool:
        """Let a slot remember what is before a position; False: it cannot forget a part, and is empty."""
        forget = self._api.llama_memory_seq_rm
        if positions and self._forgets_parts and forget(self._memory, slot, positions, -1):
            return True
        forget(self._memory, slot, -1, -1)
        return positions == 0

    def save(self, slot: int) -> SequenceState | None:
        """Copy the memory of a slot."""
        size = int(self._api.llama_state_seq_get_size(self._context, slot))
        if size == 0:
            return None
        state = SequenceState.of(bytearray(size))
        written = int(self._api.llama_state_seq_get_data(self._context, state.data, size, slot))
        return state if written == size else None

    def learn_layout(self, slot: int) -> None:
        """Understand how sequences are laid out, from a slot that holds something."""
        state = self.save(slot)
        if state is not None:
            with suppress(LayoutError):
                self.layout = learn_layout(memoryview(state.data).cast("B"))

    def restore(self, slot: int, state: SequenceState) -> bool:
        """Replace the memory of a slot by a copy."""
        size = state.size_bytes
        # The copy of an empty sequence has no cells, and llama.cpp then leaves what is there.
        self._api.llama_memory_seq_rm(self._memory, slot, -1, -1)
        read = int(self._api.llama_state_seq_set_data(self._context, state.data, size, slot))
        if read == size:
            return True
        self._api.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return False

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
