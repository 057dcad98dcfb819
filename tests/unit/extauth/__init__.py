# SPDX-License-Identifier: Apache-2.0
"""Decisions of extauth, without I/O."""
