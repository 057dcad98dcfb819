# SPDX-License-Identifier: Apache-2.0
"""`python -m extauth`: serve ext_authz."""

from chassis.serving import run
from extauth.server import main

if __name__ == "__main__":
    run(main)
