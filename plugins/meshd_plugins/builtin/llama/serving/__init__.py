"""What the mesh sees of a model: its record, its requests, what it keeps of them."""
