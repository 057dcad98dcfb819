# SPDX-License-Identifier: Apache-2.0
"""`python -m metering`: serve ext_proc."""

from chassis.serving import run
from metering.server import main

if __name__ == "__main__":
    run(main)
