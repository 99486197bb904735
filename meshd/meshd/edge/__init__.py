"""The HTTP face of a node: OpenAI's API and the mesh API on one application, and its server."""
