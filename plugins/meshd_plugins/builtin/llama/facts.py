"""What is announced of a model file: read from its header, never from its name but for the family's."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from meshd_plugins.api import ModelFacts
from meshd_plugins.builtin.llama.gguf import Gguf

DIGEST_CACHE_FILE: Final = "digests.json"
DIGESTS_MAX: Final = 256
KV_TYPE: Final = "f16"  # of both K and V: the default of llama.cpp, which we do not change

FILE_TYPES: Final[Mapping[int, str]] = {
    # general.file_type: enum llama_ftype of llama.h
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}
_QUANTISATION_SUFFIX: Final = re.compile(
    r"[.\-_]((I?Q\d\w*)|F16|F32|BF16|TQ\d_\d|MXFP4\w*|NVFP4)(-\d+-of-\d+)?$", re.IGNORECASE
)


def describe_model(header: Gguf, path: Path, digest: str, family: str = "") -> ModelFacts:
    """Return what the header says. The compatibility key is not known before a worker runs."""
    architecture = header.text("general.architecture")
    template = header.text("tokenizer.chat_template")
    file_type = header.metadata.get("general.file_type")
    quantisation = FILE_TYPES.get(file_type, "") if isinstance(file_type, int) else ""
    return ModelFacts(
        digest=digest,
        family=family or _QUANTISATION_SUFFIX.sub("", path.stem),
        architecture=architecture,
        parameters=header.parameters,
        quantisation=quantisation,
        context_tokens=header.number(f"{architecture}.context_length"),
        size_bytes=header.size_bytes,
        licence=header.text("general.license"),
        chat_template_digest=hashlib.sha256(template.encode()).hexdigest() if template else "",
    )


def compatibility_key(digest: str, build: str) -> str:
    """What must be equal for KV state to be exchanged: file, build of llama.cpp, type of the cache."""
    return hashlib.sha256(f"{digest}/{build}/{KV_TYPE}".encode()).hexdigest()[:32]


def file_digest(path: Path, state_dir: Path) -> str:
    """Return the SHA-256 of a file, from the cache when size and time are as before.

    Raises OSError when the file cannot be read. A cache that cannot be written costs only time.

    Reads the whole file: gigabytes for some models. Run it in a thread.
    """
    status = path.stat()
    mark = [status.st_size, status.st_mtime_ns]
    cache_file = state_dir / DIGEST_CACHE_FILE
    cache = _read_cache(cache_file)
    known = cache.get(str(path))
    if known is not None and known[:2] == mark:
        return str(known[2])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # Read again: another model may have been digested meanwhile.
    cache = {**_read_cache(cache_file), str(path): [*mark, digest]}
    while len(cache) > DIGESTS_MAX:
        del cache[next(iter(cache))]
    temporary = cache_file.with_suffix(f".{os.getpid()}.new")
    with suppress(OSError):
        temporary.write_text(json.dumps(cache, indent=1))
        temporary.replace(cache_file)
    return digest


def _read_cache(file: Path) -> dict[str, list[Any]]:
    """Return what is cached; a missing or damaged cache is an empty one."""
    try:
        raw: Any = json.loads(file.read_text())
        return {
            str(path): [int(entry[0]), int(entry[1]), str(entry[2])]
            for path, entry in raw.items()
            if len(str(entry[2])) == 64
        }
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return {}
