"""Training on many processes: sharded weights, shared-out experts, split heads, and states that reshard."""
