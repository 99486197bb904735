"""A model that lies on several nodes: lending memory, placing layers, carrying connections."""
