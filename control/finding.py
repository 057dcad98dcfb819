# SPDX-License-Identifier: Apache-2.0
"""What `check` finds: a place, what is wrong there, and what mends it. One line each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Finding:
    """
    One thing that must be mended before this configuration is trusted.

    >>> print(Finding(file="envoy/envoy.yaml", line=12, what="no timeout.", mend="Write one."))
    envoy/envoy.yaml:12: no timeout. Write one.
    """

    file: str
    #: Counted from 1; 0 when the whole file is meant.
    line: int = 0
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} {self.mend}"

    @property
    def where(self) -> str:
        """The place in the form that editors understand."""
        return f"{self.file}:{self.line}" if self.line else self.file
