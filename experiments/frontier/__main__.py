"""Runs the command `python -m experiments.frontier`."""

from experiments import frontier
from experiments.loop import exits

exits.leave(frontier.main)
