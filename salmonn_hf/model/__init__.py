"""What travels inside a checkpoint: everything that a process needs to load and run it, and nothing else."""
