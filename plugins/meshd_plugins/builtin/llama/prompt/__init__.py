"""From a conversation to tokens, and from tokens back to what an answer consists of; runs in the worker only."""
