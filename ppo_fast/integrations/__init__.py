"""Reversible swap-ins: the ops of ppo_fast inside the trainers people already run.

Each trainer has a module: `ppo_fast.integrations.<name>.apply()`, `.revert()` and
`with ppo_fast.integrations.<name>.patched():`. Importing this package imports none of them.
"""

import importlib

from ppo_fast.integrations._errors import (
    AlreadyPatchedError,
    ForeignPatchError,
    IntegrationError,
    MismatchError,
    NeverReachedError,
    NoPlaceError,
    NotPatchedError,
    TrainerMissingError,
    UnknownSourceError,
)
from ppo_fast.integrations._known import FOLDER, load, span

__all__ = [
    "AlreadyPatchedError",
    "ForeignPatchError",
    "IntegrationError",
    "MismatchError",
    "NeverReachedError",
    "NoPlaceError",
    "NotPatchedError",
    "TrainerMissingError",
    "UnknownSourceError",
    "installed_versions",
    "tested_versions",
]


def tested_versions() -> dict[str, tuple[str, ...]]:
    """Versions of its trainer that each adapter's tests ran with, from the lowest, by its name."""
    return {file.stem: load(file.stem).tested for file in sorted(FOLDER.glob("*.json"))}


def installed_versions() -> dict[str, str]:
    """Version of each adapter's trainer that is installed, and whether `apply()` would patch it.

    Values are such as "trl 1.17.0: not tested (1.13.0–1.16.0 are), its source is known". A trainer
    is imported only if its version is not a tested one.
    """
    found = {}
    for name, tested in tested_versions().items():
        integration = importlib.import_module(f"{__name__}.{name}").integration
        try:
            version = integration.installed()
        except TrainerMissingError:
            continue
        what = f"{integration.package} {version}: "
        if version in tested:
            found[name] = f"{what}tested ({span(tested)})"
            continue
        try:
            unknown = "; ".join(integration.check().unknown)
            known = f"not known: {unknown}" if unknown else "known"
        except IntegrationError as error:
            known = f"not known: {error}"
        found[name] = f"{what}not tested ({span(tested)} are), its source is {known}"
    return found
