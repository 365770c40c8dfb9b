"""Decoding one token of one sequence without what a whole forward pass needs around it."""
