"""Measuring checkpoints: run a task through a completer, score it with intervals, compare stages and runs."""
