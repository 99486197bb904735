"""Models in memory: whether they fit, how they are started, kept, unloaded and started again."""
