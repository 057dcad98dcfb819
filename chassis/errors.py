# SPDX-License-Identifier: Apache-2.0
"""
Name the five ways in which a use case can refuse.

Each carries one sentence for a person and, where one exists, the mend. Adapters translate
library errors into these once; faces (REST, CLI) translate these into statuses and exit codes.
A denial of a tenant's request is a value, never one of these.
"""

from __future__ import annotations


class PeajeError(Exception):
    """
    Say what is wrong in one sentence and, if known, what mends it.

    >>> print(Invalid("rpm is -1; it must not be negative.", mend="Use 0 to stop all requests."))
    rpm is -1; it must not be negative. Use 0 to stop all requests.
    """

    def __init__(self, message: str, *, mend: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message} {self.mend}" if self.mend else self.message


class Invalid(PeajeError):
    """Refuse a value that can never be right."""


class Forbidden(PeajeError):
    """Refuse what this operator may not do, whatever it is done to."""


class NotFound(PeajeError):
    """Refuse a name that nothing has."""


class Conflict(PeajeError):
    """Refuse a change that contradicts what is already there."""


class Unavailable(PeajeError):
    """Say that a dependency does not answer; the same call may succeed later."""
