"""Benchmarks of the ops, a file each: sizes, cases, inputs, least cost and goals."""
