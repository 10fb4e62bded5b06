"""Trainer that a file of tests needs; `make test-trainers` has each in an environment."""

from __future__ import annotations

import importlib.metadata

import pytest


def needs(package: str, version: str) -> None:
    """Skip the module where the package is not there in this version."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != version and not found.startswith(f"{version}."):
        pytest.skip(
            f"needs {package} {version}, found {found}: `make test-trainers`",
            allow_module_level=True,
        )
