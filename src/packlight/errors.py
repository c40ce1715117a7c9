"""Every exception packlight raises on purpose, in one place.

    PacklightError              a sentence for the user; the CLI prints it without a traceback, exit 1
    ├── UsageError              what was asked cannot be asked (wrong flag, bad size), exit 2
    │   ├── CheckpointError     a checkpoint is missing, damaged, unsafe or of an unknown kind, exit 2
    │   ├── TextError           a text is missing, unreadable or too short, exit 2
    │   └── TargetError         the output cannot be written where it was asked for, exit 2
    ├── MissingExtraError       an optional dependency is absent; the message holds the install line, exit 2
    ├── BudgetError             no recipe meets the budget, or the finished artifact missed it, exit 3
    ├── ProofError              what was saved is not what was computed, exit 1
    ├── MeasurementError        a child process that measures failed, exit 1
    └── ApiError                an HTTP request is refused; in `server/errors.py`, as no other room knows of statuses

A message says what was given, what is allowed and what to do next, in one sentence.
"""


class PacklightError(Exception):
    """Base of all errors that packlight raises on purpose. `exit_code` is what the CLI exits with."""

    exit_code = 1


class UsageError(PacklightError):
    """The request itself is wrong."""

    exit_code = 2


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, unsafe, or of a kind that packlight does not read."""


class TextError(UsageError):
    """A text is missing, unreadable, or shorter than one window."""


class TargetError(UsageError):
    """The output directory cannot be written: it exists, is read-only, or its disk is full."""


class MissingExtraError(PacklightError):
    """An optional dependency is absent.

    Args:
        package: the distribution that is missing.
        extra: the packlight extra that brings it.
        purpose: what it was needed for.
    """

    exit_code = 2

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'packlight[{extra}]'")


class BudgetError(PacklightError):
    """No recipe meets the budget, or the finished artifact missed a promise."""

    exit_code = 3


class ProofError(PacklightError):
    """An artifact that was written does not load back as the model that was computed."""


class MeasurementError(PacklightError):
    """A measuring child process ended without a result."""
