"""What was measured of a model, kept so that it need not be loaded to be announced.

One file a model and way of loading it, of what its worker said when it was ready. The key holds all that
the figures depend on: the file, the release of the library, threads, slots, context, adapters. What is
read back is checked as it was when the worker said it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from meshd_plugins.api import Value

FOLDER: Final = "figures"
FILE_BYTES_MAX: Final = 64 * 1024
FILES_MAX: Final = 256
_LEFT_OUT: Final = ("type", "isolation")
DISTRIBUTION: Final = "llama_cpp_python"


def figures_key(**parts: Value) -> str:
    """A short name for one way of loading one model."""
    try:
        build = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        build = ""
    text = json.dumps({"build": build, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class FiguresStore:
    """A folder of small files. Neither reading nor writing raises: what is lost is measured again."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / FOLDER

    def load(self, key: str) -> Mapping[str, Value] | None:
        """What was kept, or None."""
        try:
            with self._file(key).open("rb") as file:
                raw: Any = json.loads(file.read(FILE_BYTES_MAX))
        except (OSError, ValueError):
            return None
        return raw if isinstance(raw, dict) else None  # pyright: ignore[reportUnknownVariableType]

    def save(self, key: str, hello: Mapping[str, Value]) -> None:
        """Keep what a worker said; the oldest files go when there are too many."""
        kept = {name: value for name, value in hello.items() if name not in _LEFT_OUT}
        with suppress(OSError, TypeError, ValueError):
            text = json.dumps(kept)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            temporary = self._file(key).with_suffix(f".{os.getpid()}.new")
            temporary.write_text(text)
            temporary.replace(self._file(key))
            files = sorted(self._folder.iterdir(), key=lambda each: each.stat().st_mtime_ns)
            for old in files[:-FILES_MAX]:
                old.unlink()

    def forget(self, key: str) -> None:
        """Measure again next time."""
        with suppress(OSError):
            self._file(key).unlink()

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.json"
