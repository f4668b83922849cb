"""Training: one loop, and for each method a batch iterator and a step function."""
