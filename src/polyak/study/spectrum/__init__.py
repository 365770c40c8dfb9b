"""`polyak spectrum`: singular values of the layers' Jacobians of runs."""
