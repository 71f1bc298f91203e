"""Measures the claims of the README beside their baselines in one run: medians over rounds, checked for correctness."""
