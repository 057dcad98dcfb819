# SPDX-License-Identifier: Apache-2.0
"""Ports of loopback that nobody listens on."""

from __future__ import annotations

import socket


def free_port() -> int:
    """One of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
