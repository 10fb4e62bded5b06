"""Errors of patching a trainer."""

from __future__ import annotations


class IntegrationError(RuntimeError):
    """A trainer was not patched, or is not patched any more; nothing is left half patched."""


class TrainerMissingError(IntegrationError):
    """The trainer, or something that it needs to be imported, is not installed."""


class UnknownSourceError(IntegrationError):
    """The trainer's code is not known at a place: a parameter or a statement differs."""


class NoPlaceError(UnknownSourceError):
    """The trainer has no such module, class or function."""


class ForeignPatchError(IntegrationError):
    """Another library has replaced a function that was to be patched, or was patched."""


class AlreadyPatchedError(IntegrationError):
    """`apply()` without `revert()` before it."""


class NotPatchedError(IntegrationError):
    """`revert()` without `apply()` before it."""


class NeverReachedError(IntegrationError):
    """A patched op was not called once: the trainer ran without it."""


class MismatchError(IntegrationError):
    """The first call gave a result other than the trainer's own code."""


class Uncovered(Exception):  # noqa: N818
    """Raised by an adapter for options that it does not map: the trainer's own code runs."""
