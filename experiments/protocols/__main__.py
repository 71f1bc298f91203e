"""Runs the command of the package."""

from experiments import protocols
from experiments.loop import exits

exits.leave(protocols.main)
