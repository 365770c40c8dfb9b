"""Exchange with the outside: released checkpoints."""
