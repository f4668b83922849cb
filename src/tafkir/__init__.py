"""Tafkir: build, train, shrink, serve, prove and plan reasoning models that win by structure."""

__version__ = "0.1.0.dev0"
