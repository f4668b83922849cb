"""Serving a checkpoint: an OpenAI-compatible HTTP API with a browser page, and a chat in the terminal."""
