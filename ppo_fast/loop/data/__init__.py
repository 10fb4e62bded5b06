"""Sequences, prompts and stored transitions."""
