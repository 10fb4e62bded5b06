"""The benchmark suite: every op beside its peers, `pytest benchmarks/ --benchmark-only`."""
