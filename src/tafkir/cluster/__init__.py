"""Rollout workers and verifiers as Ray actors, behind the same seams as the engine and the tasks of one process."""
