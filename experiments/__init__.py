"""Runs that measure the library: one training loop, data, models and configs. Nothing in `sparsejax` imports this."""
