"""Measures the library in experiments: training, data, models and configs. `sparsejax` imports nothing of this."""
