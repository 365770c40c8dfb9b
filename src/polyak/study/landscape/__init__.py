"""`polyak study landscape`: every measurement of runs on one page, with rank correlations."""
