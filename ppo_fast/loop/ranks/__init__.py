"""Processes of a run and their shards."""
