"""The capabilities that come with meshd; they use the same hooks as any other plugin."""
