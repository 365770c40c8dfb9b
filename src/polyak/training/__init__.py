"""Training: configuration, optimizers, schedule, the loop, metrics and run folders."""
