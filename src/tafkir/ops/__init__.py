"""Tensor operations, each beside its slow reference: norm, rope, attention, mixture of experts, loss."""
