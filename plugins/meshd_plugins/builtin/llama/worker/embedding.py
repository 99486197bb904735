"""llama.cpp as a maker of vectors and scores: one model, one context, whole texts in, one row each out.

A batch is one `llama_encode` (an encoder: no memory) or one `llama_decode` (a model that could write: its
memory is emptied before each batch), computed in one piece, since llama.cpp pools what one piece holds. So
a text is never longer than the context's `n_ubatch`, and the sequences share one memory (`kv_unified`):
with one each, llama.cpp would cut a batch of unequal texts into many small pieces.
"""

from __future__ import annotations

import ctypes
import os
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.arguments import Adapter, Arguments
from meshd_plugins.builtin.llama.models.pooling import Pooling
from meshd_plugins.builtin.llama.worker.adapters import put_on
from meshd_plugins.builtin.llama.worker.backend import ModelUnusable, physical_cores
from meshd_plugins.builtin.llama.worker.crowding import Stopwatch, Threads
from meshd_plugins.builtin.llama.worker.devices import list_devices
from meshd_plugins.builtin.llama.worker.low_level import import_low_level
from meshd_plugins.builtin.llama.worker.vocabulary import Vocabulary
from meshd_plugins.vectors import FLOAT_BYTES

TEXTS_MAX: Final = 64  # of a batch; llama.cpp takes 256 sequences at most
BATCH_TOKENS: Final = 256
"""Tokens of a batch on a processor. Attention is computed over the whole batch, so that more is slower:
1,000 to 1,700 tokens of a small encoder cost 15 % more time in batches of 1,024 (decision 0027)."""
BATCH_TOKENS_GPU: Final = 512
LOGITS_BYTES_MAX: Final = 512 * 1024 * 1024
"""llama.cpp keeps a row of logits for each token of a batch, also when nobody wants them. With a large
vocabulary that bounds how long a text may be, unless larger batches are configured."""
MEASURE_TEXT_TOKENS: Final = 32
MEASURE_S: Final = 0.3  # no batch begins after that
_FLASH: Final = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type
_LOG_WARN, _LOG_ERROR = 3, 4


@dataclass(frozen=True, slots=True)
class EmbeddingLoad:
    """How a model is loaded."""

    path: str  # /proc/self/fd/N: the very file that was verified
    pooling: Pooling
    context_tokens: int  # of one text at most; 0: as many as the model was trained with
    batch_tokens: int  # a text of so many is taken however wide its logits are
    threads: int  # 0: one a physical core
    gpu_layers: int  # -1: all that fit the device
    flash_attention: str = "auto"
    adapters: tuple[Adapter, ...] = ()  # LoRA, always on

    @classmethod
    def of(cls, arguments: Arguments, pooling: Pooling) -> EmbeddingLoad:
        """As the daemon wants it: the file is opened anew through its descriptor, never by its name."""
        return cls(
            path=f"/proc/self/fd/{arguments.file}",
            pooling=pooling,
            context_tokens=arguments.context_tokens,
            batch_tokens=arguments.batch_tokens,
            threads=arguments.threads,
            gpu_layers=arguments.gpu_layers,
            flash_attention=arguments.flash_attention,
            adapters=arguments.adapters,
        )


@dataclass(frozen=True, slots=True)
class EmbeddingFigures:
    """How large its vectors are, and how fast they are made here: of texts of `MEASURE_TEXT_TOKENS`."""

    dimensions: int
    tokens_per_s: float
    texts_per_s: float
    batch_tokens: int

    def to_wire(self) -> dict[str, Value]:
        """For the worker's hello."""
        return asdict(self)


class EmbeddingBackend:
    """Turns tokens into rows of floats."""

    def __init__(self, load: EmbeddingLoad) -> None:
        """Load the model and make its context. Raises ModelUnusable, AdapterMismatch."""
        self.api = api = import_low_level()
        self._log_callback = api.llama_log_callback(_log)  # must outlive the library's use of it
        api.llama_log_set(self._log_callback, ctypes.c_void_p(0))
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = load.gpu_layers
        self._model = api.llama_model_load_from_file(os.fsencode(load.path), parameters)
        if not self._model:
            raise ModelUnusable("llama.cpp cannot load it")
        self.vocabulary = Vocabulary(api, self._model)
        self.threads = load.threads or physical_cores()
        self.offloads = load.gpu_layers != 0 and bool(list_devices())
        self._crowding: Threads | None = None
        usual = BATCH_TOKENS_GPU if self.offloads else BATCH_TOKENS
        self.text_tokens = self._longest_text(load)
        self.batch_tokens = min(load.batch_tokens, usual)
        self.step_tokens = max(self.batch_tokens, self.text_tokens)  # of the longest batch
        self._context = self._make_context(load, self.step_tokens)
        put_on(api, self._model, self._context, load.adapters)
        self._short_tokens = self.batch_tokens  # computed before anybody asks for a sign of life
        self.alive: Callable[[], None] = _nothing
        """Called between the operations of a long batch: a slow device takes minutes for a long text."""
        self._between = api.ggml_abort_callback(self._go_on)  # must outlive its use too
        self._never = api.ggml_abort_callback()
        self._memory = api.llama_get_memory(self._context)
        ranks = load.pooling is Pooling.RANK
        self.dimensions = 1 if ranks else int(api.llama_model_n_embd_out(self._model))

    def adapt_threads(self) -> None:
        """From now on have as many threads as there are processors for; see `LlamaBackend.adapt_threads`."""
        if not self.offloads:
            self._crowding = Threads(self.threads, self._use_threads)

    def _use_threads(self, threads: int) -> None:
        self.api.llama_set_n_threads(self._context, threads, threads)

    def _longest_text(self, load: EmbeddingLoad) -> int:
        """Tokens that a text may have: positions beyond the trained ones have no weights."""
        trained = int(self.api.llama_model_n_ctx_train(self._model))
        logits = LOGITS_BYTES_MAX // (FLOAT_BYTES * max(self.vocabulary.size, 1))
        bounds = (trained, load.context_tokens or trained, max(logits, load.batch_tokens))
        return max(1, min(bound for bound in bounds if bound > 0))

    def _make_context(self, load: EmbeddingLoad, tokens: int) -> Any:
        """Make a context that computes that many tokens at once. Raises ModelUnusable."""
        api = self.api
        options = api.llama_context_default_params()
        options.n_seq_max = self.texts_max = min(TEXTS_MAX, tokens)
        tokens = -(-tokens // self.texts_max) * self.texts_max  # else llama.cpp aborts on the rest
        options.n_ctx = options.n_batch = options.n_ubatch = options.n_outputs_max = tokens
        options.n_threads = options.n_threads_batch = self.threads
        options.pooling_type = load.pooling.number
        options.flash_attn_type = _FLASH[load.flash_attention]
        options.embeddings = options.kv_unified = options.no_perf = True
        context = api.llama_init_from_model(self._model, options)
        if not context:
            raise ModelUnusable(f"no memory for batches of {tokens} tokens")
        self._batch = api.llama_batch_init(tokens, 0, 1)
        for index in range(tokens):
            self._batch.n_seq_id[index] = 1
            self._batch.logits[index] = 1
        return context

    @property
    def build(self) -> str:
        """What was built."""
        version = getattr(self.api, "llama_version", None)
        return str(version().decode()) if version else ""

    @property
    def system(self) -> str:
        """Instruction sets and devices in use, as llama.cpp lists them."""
        return str(self.api.llama_print_system_info().decode("utf-8", "replace"))

    @property
    def rerank_template(self) -> str:
        """How the model wants a query and a document put together, "" when it does not say."""
        template = self.api.llama_model_chat_template(self._model, b"rerank")
        return str(template.decode("utf-8", "replace")) if template else ""

    def compute(self, texts: Sequence[Sequence[int]]) -> list[array[float]]:
        """Return a row for each text, not normalised. Raises RuntimeError: the context is lost."""
        batch, api = self._batch, self.api
        assert 0 < len(texts) <= self.texts_max
        count = 0
        for sequence, tokens in enumerate(texts):
            for position, token in enumerate(tokens):
                batch.token[count] = token
                batch.pos[count] = position
                batch.seq_id[count][0] = sequence
                count += 1
        batch.n_tokens = count
        compute = api.llama_encode
        if self._memory:
            api.llama_memory_clear(self._memory, False)
            compute = api.llama_decode
        long = count > self._short_tokens
        if long:
            api.llama_set_abort_callback(self._context, self._between, None)
        watch = Stopwatch()
        status = compute(self._context, batch)
        if self._crowding is not None:
            self._crowding.stepped(*watch.read())
        if long:
            api.llama_set_abort_callback(self._context, self._never, None)
        if status != 0:
            raise RuntimeError(f"llama.cpp returned {status} for {count} tokens")
        return [self._row(sequence) for sequence in range(len(texts))]

    def _go_on(self, _data: object) -> bool:
        """llama.cpp asks whether to stop; from the main thread, which it computes with too."""
        self.alive()
        return False

    def _row(self, sequence: int) -> array[float]:
        pointer = self.api.llama_get_embeddings_seq(self._context, sequence)
        if not pointer:
            raise RuntimeError("llama.cpp has no vector for a text")
        row = array("f")
        row.frombytes(ctypes.string_at(pointer, self.dimensions * FLOAT_BYTES))
        return row

    def measure(self) -> EmbeddingFigures:
        """Warm up (the first batch reads the model from disk) and time batches of short texts."""
        tokens = min(MEASURE_TEXT_TOKENS, self.text_tokens)
        text = [(7 * n + 5) % self.vocabulary.size for n in range(tokens)]
        self.compute([text])
        self.adapt_threads()
        self.compute([text])
        texts = [text] * max(1, min(self.texts_max, self.batch_tokens // tokens))
        batches = 0
        started_s = time.monotonic()
        while batches == 0 or time.monotonic() - started_s < MEASURE_S:
            self.compute(texts)
            batches += 1
        per_s = batches * len(texts) / (time.monotonic() - started_s)
        self._short_tokens = min(self.batch_tokens, int(per_s * tokens))  # of a second
        return EmbeddingFigures(self.dimensions, per_s * tokens, per_s, self.batch_tokens)


def _nothing() -> None:
    pass


def _log(level: int, text: bytes, _data: object) -> None:
    """Let warnings and errors of llama.cpp through to stderr, where the daemon keeps the last lines."""
    if level in (_LOG_WARN, _LOG_ERROR):
        os.write(2, text)
