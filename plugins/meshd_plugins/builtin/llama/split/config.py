"""The table [plugins.llama.rpc], and the key `split` of a model, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

from meshd_plugins.api import PluginConfigError, Value

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
    for key in entry:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"
            )
            raise PluginConfigError(f"{WHERE} has the unknown key {key!r}{hint}")
    privacy = entry.get("privacy", "lan")
    if privacy not in ("lan", "mesh"):
        raise PluginConfigError(f"{WHERE}.privacy is {privacy!r}: one of lan, mesh")
    return RpcConfig(
        offer_mib=_integer(entry, "offer_mib", 0, OFFER_MIB_MAX, 0),
        threads=_integer(entry, "threads", 0, 1024, 0),
        gpu=_switch(entry, "gpu"),
        privacy=str(privacy),
        silence_s=_integer(entry, "silence_s", 2, 600, 10),
        step_deadline_s=_integer(entry, "step_deadline_s", 0, 3600, 0),
        allow_loopback=_switch(entry, "allow_loopback"),
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


def _integer(entry: Mapping[str, Value], name: str, least: int, most: int, default: int) -> int:
    value = entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PluginConfigError(f"{WHERE}.{name} is {value!r}: an integer from {least} to {most}")
    return value


def _switch(entry: Mapping[str, Value], name: str) -> bool:
    value = entry.get(name, False)
    if not isinstance(value, bool):
        raise PluginConfigError(f"{WHERE}.{name} is {value!r}: true or false")
    return value
