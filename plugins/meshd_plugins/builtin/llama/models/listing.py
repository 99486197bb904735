"""One row of `meshd model list` for each model, wherever it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, assert_never

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.config import ModelConfig
from meshd_plugins.builtin.llama.models.entries import Entry
from meshd_plugins.builtin.llama.models.folder import Begun
from meshd_plugins.builtin.llama.models.jobs import Job
from meshd_plugins.builtin.llama.models.kinds import Kind

UNSERVED: Final = "not served"

Row = dict[str, Value]


def entry_row(entry: Entry, standing: Mapping[str, Value], users: Sequence[str] = ()) -> Row:
    """A model of the library; of what is none, `users` are the models that it is served with."""
    facts = entry.facts
    row: Row = {
        "id": entry.id,
        "origin": "library",
        "state": UNSERVED,
        "reason": "" if entry.served else _why_not(entry),
        "names": list(entry.names),
        "source": entry.source,
        "path": entry.path,
        "kept": entry.kept,
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "kind": entry.kind.value,
        "options": entry.options,
        "added_at_s": entry.added_at_s,
    }
    if facts is not None:
        row |= {
            "family": entry.options.get("family") or facts.family,
            "architecture": facts.architecture,
            "quantisation": facts.quantisation,
            "parameters": facts.parameters,
            "context_trained": facts.context_tokens,
            "licence": facts.licence,
            "modalities": list(facts.modalities),
        }
    if entry.served:
        row |= {"state": "starting", **standing}
    elif users:
        row |= {"state": f"{entry.kind} of {', '.join(users)}", "reason": ""}
    return row


def configured_row(key: str, model: ModelConfig, standing: Mapping[str, Value]) -> Row:
    """A model of the node's configuration."""
    return {
        "id": key,
        "origin": "configuration",
        "state": "starting",
        "reason": "",
        "names": list(model.names),
        "source": model.path,
        "path": model.path,
        **standing,
    }


def transfer_row(begun: Begun, here_bytes: int, job: Job | None) -> Row:
    """A model that is on its way, or was."""
    row: Row = {
        "id": begun.id if job is None else job.id,
        "origin": "transfer",
        "names": [],
        "source": begun.source,
        "size_bytes": None,
        "arrived_bytes": here_bytes,
    }
    if job is None:
        return row | {
            "state": "stopped",
            "reason": f"`meshd model add {begun.source}`, with the options of the first time, goes on with it",
        }
    row |= {"state": job.stage, "reason": "", "arrived_bytes": job.bytes, "size_bytes": job.total}
    if job.parts > 1:
        row |= {"part": job.part, "parts": job.parts}
    return row


def _why_not(entry: Entry) -> str:
    match entry.kind:
        case Kind.ADAPTER:
            return f"an adapter: `meshd model add MODEL --lora {entry.id}` serves it with a model"
        case Kind.PROJECTOR:
            return f"a projector: `meshd model add MODEL --projector {entry.id}` serves it with a model"
        case Kind.MODEL:
            pass
        case _:
            assert_never(entry.kind)
    return f"its description was lost: remove it, or `meshd model add {entry.path}` with its names"
