"""Paired differences, verdicts, intervals and rank correlations. No torch."""
