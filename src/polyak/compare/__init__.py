"""The main job: entries, plan, runs in processes, results, verdict and page."""
