"""The decoder and its parts, built from a `ModelConfig` alone."""
