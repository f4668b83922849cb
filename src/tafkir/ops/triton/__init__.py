"""Triton kernels for GPUs, each with the signature of the op that it stands in for; imported by nobody on import."""
