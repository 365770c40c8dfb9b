"""Run folders: settings, metrics, checkpoints, the finished model."""
