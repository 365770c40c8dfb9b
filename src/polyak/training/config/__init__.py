"""What a training run is configured by, and recipes. No torch."""
