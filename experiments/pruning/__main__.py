"""Runs the command `python -m experiments.pruning`."""

from experiments import pruning
from experiments.loop import exits

exits.leave(pruning.main)
