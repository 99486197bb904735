"""What is announced of a model file: read from its header, never from its name but for the family's.

The header is read in the worker, where a hostile one does no harm; what it says comes to the daemon in
the worker's hello, and is checked there like anything that comes from outside.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from meshd_plugins.api import ModelFacts, Value
from meshd_plugins.builtin.llama.models.gguf import Gguf
from meshd_plugins.builtin.llama.models.projector import KNOWN, TEXT_ONLY, modalities_of

TEXT_LENGTH_MAX: Final = 80  # of what is announced of a file's own words
NUMBER_MAX: Final = 2**62
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


def describe_model(
    header: Gguf,
    path: Path,
    digest: str,
    family: str = "",
    pooling: str = "",
    projector: Gguf | None = None,
) -> ModelFacts:
    """Return what the headers say. The compatibility key is not known before a worker runs.

    Raises:
        ProjectorMismatch: the projector is none.
    """
    architecture = _words(header.text("general.architecture"))
    template = header.text("tokenizer.chat_template")
    file_type = header.metadata.get("general.file_type")
    quantisation = FILE_TYPES.get(file_type, "") if isinstance(file_type, int) else ""
    return ModelFacts(
        digest=digest,
        family=_words(family) or family_of(path.name),
        architecture=architecture,
        parameters=header.parameters,
        quantisation=quantisation,
        context_tokens=max(0, min(header.number(f"{architecture}.context_length"), NUMBER_MAX)),
        size_bytes=header.size_bytes,
        licence=_words(header.text("general.license")),
        chat_template_digest=hashlib.sha256(template.encode()).hexdigest() if template else "",
        pooling=pooling,
        modalities=TEXT_ONLY if projector is None else modalities_of(projector),
    )


def family_of(name: str) -> str:
    """What people call a model whose file has that name."""
    return _words(_QUANTISATION_SUFFIX.sub("", Path(name).stem))


def compatibility_key(digest: str, build: str) -> str:
    """What must be equal for KV state to be exchanged: file, build of llama.cpp, type of the cache."""
    return hashlib.sha256(f"{digest}/{build}/{KV_TYPE}".encode()).hexdigest()[:32]


def facts_to_wire(facts: ModelFacts) -> dict[str, Value]:
    """For the worker's hello; what the daemon knows better is left out."""
    told = {name: getattr(facts, name) for name in (*_TEXTS, *_NUMBERS)}
    return {**told, "modalities": list(facts.modalities)}


def facts_from_wire(value: Value, digest: str) -> ModelFacts:
    """Read what a worker says. Raises ValueError: it is not what ours says."""
    raw: Mapping[str, Value] = value if isinstance(value, Mapping) else {}
    texts = {name: raw.get(name) for name in _TEXTS}
    numbers = {name: raw.get(name) for name in _NUMBERS}
    for name, text in texts.items():
        if not isinstance(text, str) or len(text) > TEXT_LENGTH_MAX or not text.isprintable():
            raise ValueError(f"the worker calls the model's {name} {str(text)[:80]!r}")
    for name, number in numbers.items():
        if not isinstance(number, int) or not 0 <= number <= NUMBER_MAX:
            raise ValueError(f"the worker says that the model's {name} is {str(number)[:80]}")
    modalities = modalities_from_wire(raw.get("modalities"))
    return ModelFacts(digest=digest, modalities=modalities, **texts, **numbers)  # type: ignore[arg-type]


def modalities_from_wire(value: Value) -> tuple[str, ...]:
    """What a worker says that a model reads. Raises ValueError: it is not what ours says."""
    said = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    found = tuple(each for each in KNOWN if each in said)
    if found[:1] != TEXT_ONLY or len(found) != len(said):
        raise ValueError(f"the worker says that the model reads {str(value)[:80]}")
    return found


_TEXTS: Final = (
    "family",
    "architecture",
    "quantisation",
    "licence",
    "chat_template_digest",
    "pooling",
)
_NUMBERS: Final = ("parameters", "context_tokens", "size_bytes")


def _words(text: str) -> str:
    """A short text of one line, whatever the file says."""
    return "".join(c for c in text[:TEXT_LENGTH_MAX] if c.isprintable())
