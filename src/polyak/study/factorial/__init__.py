"""`polyak study factorial`: a grid of options as an analysis of variance."""
