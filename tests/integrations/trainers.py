"""Trainer that a file of tests needs; `make test-trainers` has each in an environment."""

from __future__ import annotations

import importlib
import importlib.metadata

import pytest

from ppo_fast.integrations._known import span


def needs(adapter: str) -> None:
    """Skip the module where the adapter's trainer is not there in one of the tested versions."""
    integration = importlib.import_module(f"ppo_fast.integrations.{adapter}").integration
    needs_version(integration.package, *integration.tested)


def needs_version(package: str, *versions: str) -> None:
    """Skip the module where the package is not there in one of these versions."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found not in versions:
        pytest.skip(
            f"needs {package} {span(versions)}, found {found}: `make test-trainers`",
            allow_module_level=True,
        )
