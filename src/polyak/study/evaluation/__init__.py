"""`polyak evaluate`: losses of runs on any corpora, attention entropy, downstream tasks."""
