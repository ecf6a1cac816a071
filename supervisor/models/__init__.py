"""Which models are there? The folder, its GGUF files, and the list that is made of them."""
