"""Looking at runs: one folder a subject, each with `measure`, `figures` and `page`."""
