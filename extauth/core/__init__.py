# SPDX-License-Identifier: Apache-2.0
"""The decision, pure: no I/O, no clock, no transport types."""
