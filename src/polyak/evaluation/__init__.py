"""Looking at trained models from outside: losses on any text, attention, forgetting."""
