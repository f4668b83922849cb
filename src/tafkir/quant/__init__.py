"""Quantization: which tensor gets which number format. The formats themselves are in `ops`."""
