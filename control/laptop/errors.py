# SPDX-License-Identifier: Apache-2.0
"""What stops `up`, `down` or `status`: one clear line with the mend, and what proves it."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.errors import PeajeError


class Trouble(PeajeError):
    """A failure to tell a person about; *details* are further lines, such as the end of a log."""

    def __init__(
        self, message: str, *, mend: str | None = None, details: Sequence[str] = ()
    ) -> None:
        super().__init__(message, mend=mend)
        self.details = tuple(details)

    def lines(self) -> list[str]:
        """The line, then its details, indented."""
        return [str(self), *(f"    {detail}" for detail in self.details)]
