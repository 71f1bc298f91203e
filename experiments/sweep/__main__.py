"""Runs the command `python -m experiments.sweep`."""

from experiments import sweep
from experiments.loop import exits

exits.leave(sweep.main)
