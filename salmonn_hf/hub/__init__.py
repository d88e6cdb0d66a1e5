"""Checkpoints to the Hugging Face hub, and their cards."""
