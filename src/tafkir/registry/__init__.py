"""The model registry: versions of checkpoints by their content, signed, promoted by evidence. Without torch."""
