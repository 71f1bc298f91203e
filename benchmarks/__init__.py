"""Measured claims: each in one run, side by side with its baseline, checked for correctness, medians over rounds."""
