# SPDX-License-Identifier: Apache-2.0
"""`python -m control`, which `./peaje` hands over to: the command line and nothing else."""

from __future__ import annotations

from control.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
