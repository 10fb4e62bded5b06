"""Benchmark suite, every op against its peers: `pytest benchmarks/ --benchmark-only`."""
