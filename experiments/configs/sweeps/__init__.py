"""Holds the configs of sweeps: `get_config()` as everywhere, and beside it `get_sweep()`, which returns the axes."""
