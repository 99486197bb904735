"""Model files: what is in them, whether they are the ones that were meant."""
