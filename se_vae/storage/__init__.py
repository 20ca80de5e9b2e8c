"""Files that are written whole or not at all, locks, verified checkpoints and saved models."""
