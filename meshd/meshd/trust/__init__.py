"""Who belongs to the mesh: identities, certificates, keys, and how they are given and taken away."""
