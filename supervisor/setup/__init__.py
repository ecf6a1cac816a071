"""How does a machine get what it needs? The native build, the first models, and what is missing."""
