"""Checkpoints of other layouts to this package's, and back."""
