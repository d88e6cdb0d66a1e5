"""Evaluation: predictions by any number of processes, metrics with their intervals, reports, memory and times."""
