"""Calibration of weights of few bits."""
