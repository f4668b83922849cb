"""The inference engine: continuous batching over a key-value cache, on the same decoder that trains."""
