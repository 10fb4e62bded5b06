"""Reversible swap-ins: the ops of ppo_fast inside the trainers people already run.

Each trainer has a module: `ppo_fast.integrations.<name>.apply()`, `.revert()` and
`with ppo_fast.integrations.<name>.patched():`. Importing this package imports none of them.
"""

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
]
