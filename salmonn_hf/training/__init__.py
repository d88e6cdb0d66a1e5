"""Training: the stages, what each trains and from what it starts, and checkpoints."""
