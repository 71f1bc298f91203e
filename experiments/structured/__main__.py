"""Runs the command `python -m experiments.structured`."""

from experiments import structured
from experiments.loop import exits

exits.leave(structured.main)
