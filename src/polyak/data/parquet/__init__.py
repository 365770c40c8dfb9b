"""Parquet: the rows of one column, read within a bound on memory."""
