"""The table [plugins.llama.rpc], and the key `split` of a model, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

from meshd_plugins.api import PluginConfigError, Value
from meshd_plugins.tables import read_boolean, read_choice, read_integer, reject_unknown

AUTO: Final = ("auto",)
NODES_MAX: Final = 15
OFFER_MIB_MAX: Final = 4_194_304
WHERE: Final = "plugins.llama.rpc"


@dataclass(frozen=True, slots=True)
class RpcConfig:
    """Lending memory to models of other nodes, and borrowing it."""

    offer_mib: int = 0  # of memory lent to one model of a peer; 0: nothing is lent
    threads: int = 0  # that compute for it; 0: all of the machine
    gpu: bool = False  # lend the GPU's memory, instead of the machine's
    privacy: str = "lan"  # the widest distance from which it is lent: lan or mesh
    silence_s: int = 10
    """Seconds of silence after which the lent process counts as hung and is ended. Up: a busy machine is
    believed longer, and whoever borrows waits longer for the reload."""
    step_deadline_s: int = 0
    """Of a model that is split: silence with requests open after which its worker is ended; 0: as of any
    model. The last resort, for what neither the lender's node nor the stream to it notices."""
    allow_loopback: bool = False
    """Where the system allows no network namespace: use the machine's loopback, which every program on this
    machine reaches. `meshd doctor` says so."""

    @property
    def offer_bytes(self) -> int:
        """As bytes."""
        return self.offer_mib * 1024 * 1024


def read_rpc(table: Mapping[str, Value]) -> RpcConfig:
    """Check `rpc` of the plugin's table. Raises PluginConfigError."""
    entry = table.get("rpc", {})
    if not isinstance(entry, Mapping):
        raise PluginConfigError(f"{WHERE} must be a table like {{offer_mib = 2048}}")
    known = [field.name for field in fields(RpcConfig)]
    reject_unknown(entry, known, WHERE)
    return RpcConfig(
        offer_mib=read_integer(entry, "offer_mib", WHERE, 0, OFFER_MIB_MAX, default=0),
        threads=read_integer(entry, "threads", WHERE, 0, 1024, default=0),
        gpu=read_boolean(entry, "gpu", WHERE, default=False),
        privacy=read_choice(entry, "privacy", WHERE, ("lan", "mesh"), default="lan"),
        silence_s=read_integer(entry, "silence_s", WHERE, 2, 600, default=10),
        step_deadline_s=read_integer(entry, "step_deadline_s", WHERE, 0, 3600, default=0),
        allow_loopback=read_boolean(entry, "allow_loopback", WHERE, default=False),
    )


def read_split(entry: Mapping[str, Value], where: str) -> tuple[str, ...]:
    """Check `split` of a model: names of nodes, `AUTO`, or none. Raises PluginConfigError."""
    value = entry.get("split", ())
    if value == "auto":
        return AUTO
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str | bytes)
        or len(value) > NODES_MAX
        or not all(isinstance(name, str) and name for name in value)
        or len(set(value)) != len(value)
    ):
        raise PluginConfigError(
            f'{where}.split is {value!r}: give "auto", or a list of at most {NODES_MAX} names of nodes'
        )
    return tuple(str(name) for name in value)
