"""The scheduler of sequences: pure, no clock, no I/O; the model is behind `Backend`."""
