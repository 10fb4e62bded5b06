"""What can go wrong when a trainer is patched: an error each."""

from __future__ import annotations


class IntegrationError(RuntimeError):
    """A trainer was not patched, or is not patched any more; nothing is left half patched."""


class TrainerMissingError(IntegrationError):
    """The trainer, or something that it needs to be imported, is not installed."""


class WrongVersionError(IntegrationError):
    """The trainer's version is not the one that the swap-in was written for."""


class UnknownSourceError(IntegrationError):
    """The trainer's code is not what its version says: a name or a statement is not there."""


class ForeignPatchError(IntegrationError):
    """Another library has replaced what was to be patched, or what had been."""


class AlreadyPatchedError(IntegrationError):
    """`apply()` without `revert()` before it."""


class NotPatchedError(IntegrationError):
    """`revert()` without `apply()` before it."""


class NeverReachedError(IntegrationError):
    """A patched op was not called once: the trainer ran without it."""


class MismatchError(IntegrationError):
    """The first call gave something else than the trainer's own code."""


class Uncovered(Exception):  # noqa: N818
    """Raised by an adapter for options that it does not map: the trainer's own code runs."""
