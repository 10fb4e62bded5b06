"""Placeholder until the loader lands."""


def load() -> str | None:
    return "not built"
