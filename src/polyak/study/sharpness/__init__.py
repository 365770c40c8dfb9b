"""`polyak sharpness`: the Hessian of runs."""
