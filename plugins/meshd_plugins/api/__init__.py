"""The types a capability plugin is written against.

A plugin registers *capabilities*: objects with a descriptor (what is announced), an admission limit
(slots) and `invoke`, which yields events. Everything built in uses what can be imported from here and
nothing else of the daemon.

The contract of `invoke`, in one paragraph: it yields any number of `Chunk`s and then exactly one `Done`.
A stream that ends without `Done` is a failure and is reported as one, never as a finished answer.
Before the first chunk it may raise `Refused`, and the daemon may then ask another peer; after the first
chunk it may only raise `Failed`. Cancellation arrives as trio's `Cancelled` at any await: clean up and
let it pass.
"""

from meshd_plugins.api.daemon import (
    Capabilities,
    Logger,
    NoPeers,
    PeerOffer,
    Peers,
    PluginContext,
    Supervisor,
    Tunnel,
    Worker,
    WorkerCall,
    WorkerSpec,
)
from meshd_plugins.api.hooks import (
    BackgroundTask,
    Complaint,
    PluginConfigError,
    PluginOperation,
    Reading,
)
from meshd_plugins.api.prefixes import (
    PrefixExport,
    PrefixHead,
    PrefixHolder,
    WarmPrefix,
)
from meshd_plugins.api.requests import (
    HOP_HEADER,
    BadRequest,
    Capability,
    CapabilityError,
    Chunk,
    Descriptor,
    Done,
    Event,
    Failed,
    ModelFacts,
    Operation,
    Privacy,
    Rates,
    Refused,
    Request,
    TokenLogprob,
    ToolCallDelta,
    Usage,
    Value,
)

__all__ = [
    "HOP_HEADER",
    "BackgroundTask",
    "BadRequest",
    "Capabilities",
    "Capability",
    "CapabilityError",
    "Chunk",
    "Complaint",
    "Descriptor",
    "Done",
    "Event",
    "Failed",
    "Logger",
    "ModelFacts",
    "NoPeers",
    "Operation",
    "PeerOffer",
    "Peers",
    "PluginConfigError",
    "PluginContext",
    "PluginOperation",
    "PrefixExport",
    "PrefixHead",
    "PrefixHolder",
    "Privacy",
    "Rates",
    "Reading",
    "Refused",
    "Request",
    "Supervisor",
    "TokenLogprob",
    "ToolCallDelta",
    "Tunnel",
    "Usage",
    "Value",
    "WarmPrefix",
    "Worker",
    "WorkerCall",
    "WorkerSpec",
]
