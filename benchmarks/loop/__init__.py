"""Benchmarks of the training loop: one update, sampling, whole runs."""
