"""Rollouts from vLLM and SGLang servers, one or a pool of them, behind `Completer`."""
