"""`knowledge.gpt/...`: the models of a server that runs already: Ollama, llama-server, vLLM, OpenAI's API.

    [[plugins.adopt.servers]]
    url = "http://127.0.0.1:11434"

Without configuration the well-known ports of this machine are looked at. `config.ServerConfig` lists the keys.
What such a server sends is not trusted: it is bounded, checked and cleaned like a peer's word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meshd_plugins.api import BackgroundTask, Complaint, PluginContext
from meshd_plugins.builtin.adopt.config import read_settings
from meshd_plugins.builtin.adopt.plugin import AdoptPlugin
from meshd_plugins.hookspecs import hookimpl

_running: dict[Path, AdoptPlugin] = {}  # by the plugin's state folder: one a running node


@hookimpl
def meshd_register(context: PluginContext) -> None:
    """Check the configuration; models are announced once their server has answered."""
    read_settings(context.config)


@hookimpl
def meshd_background(context: PluginContext) -> BackgroundTask | None:
    """Watch the servers."""
    settings = read_settings(context.config)
    if not settings.servers and not settings.probe:
        return None
    plugin = _running[context.state_dir] = AdoptPlugin(context, settings)
    return plugin.run


@hookimpl
def meshd_complaints(context: PluginContext) -> Sequence[Complaint]:
    """Say which server is down, and which is open to strangers."""
    plugin = _running.get(context.state_dir)
    return plugin.complaints() if plugin is not None else ()
