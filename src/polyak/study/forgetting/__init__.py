"""`polyak forgetting`: what a run loses while it learns something else."""
