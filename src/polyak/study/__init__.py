"""Comparing: plan, run, statistics, report."""
