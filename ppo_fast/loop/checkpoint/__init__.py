"""Checkpoints: their folders, when they are written, and the state in them."""
