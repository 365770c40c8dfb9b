"""`polyak report`: the course of runs."""
