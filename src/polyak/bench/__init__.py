"""Timing, interleaved: models, ops, loss, generation, tokenizing."""
