"""Trains and tests the runs of a config: the step, checkpoints, measurements, stopping, and several hosts."""
