"""The process that holds one language model: `python -m meshd_plugins.builtin.llama.worker`."""
