"""The pure cores: no clock, no socket, no global randomness; told the time, they return effects."""
