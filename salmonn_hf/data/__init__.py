"""From corpora on disk to batches for training."""
