"""Training and testing: options, batches, loops, checkpoints, metrics and fast inference."""
