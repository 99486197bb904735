"""The low-level module of llama-cpp-python, and nothing else of that package.

It is imported without its package's `__init__`, which would load the high-level API (numpy, disk caches,
chat formats): four times the start-up time and some 30 MiB that nothing here uses.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


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
