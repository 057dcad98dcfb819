# SPDX-License-Identifier: Apache-2.0
"""`python -m ratelimit`: serve the rate limit service."""

from chassis.serving import run
from ratelimit.server import main

if __name__ == "__main__":
    run(main)
