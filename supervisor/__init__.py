"""llama-supervisor: one OpenAI-compatible address in front of native llama-server children."""

__version__ = "0.1.0"
